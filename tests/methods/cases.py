"""One line a method: how the contract suite makes it small, and what it does not need to be asked."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.nn import FeatureQueue
from lightning_contrast.precision import upcast


class TinyBackbone(nn.Module):
    """Two convolutions without BatchNorm, so that two ranks can equal one process."""

    num_features = 8

    def __init__(self, norm: bool = False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.GELU(),
            nn.Conv2d(6, 8, 3, 2, 1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, images):
        return self.layers(images)


def tiny_vit(norm: bool = True):
    """A transformer of two blocks with patches of 4 pixels, whose patches can be masked; it has no BatchNorm anyway."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return VisionTransformer(num_classes=0, dynamic_img_size=True, **sizes)


def tiny_patch_vit(norm: bool = True):
    """The same without class token, as I-JEPA has it."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    pooling = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return VisionTransformer(num_classes=0, dynamic_img_size=True, **sizes, **pooling)


@dataclass(frozen=True)
class Case:
    """A method in small.

    Args:
        make: Called with a backbone and keyword arguments (optimizer, lr, warmup_epochs).
        plain: Further arguments that take BatchNorm out of the heads.
        views: Number of views in a batch.
        settings: Arguments that make the method small.
        indices: The method needs sample indices in the batch.
        backbone: Called with whether BatchNorm is wanted.
        argument: Name of the argument that takes the backbone.
    """

    make: Callable[..., L.LightningModule]
    plain: dict = field(default_factory=dict)
    views: int = 2
    settings: dict = field(default_factory=dict)
    indices: bool = False
    backbone: Callable[[bool], nn.Module] = TinyBackbone
    argument: str = "backbone"

    @property
    def stateful(self) -> bool:
        """Whether the class has a momentum network or a queue."""
        return hasattr(self.make, "momentum_pairs") or hasattr(self.make, "queues")


CASES = {
    "SimCLR": Case(lc.SimCLR, plain={"head_norm": None}),
    "SimCLR v2": Case(lambda *a, **k: lc.SimCLR(*a, head_layers=3, evaluation_layer=1, **k), plain={"head_norm": None}),
}


class LearnedSimCLR(lc.SimCLR):
    """With a module of its own: a checkpoint does not hold constructor arguments that are modules."""

    def __init__(self, backbone, **kwargs):
        own = {"weighting": lc.losses.Negatives("hard", tau_plus=0.02), "temperature": lc.nn.LearnedTemperature(0.2)}
        super().__init__(backbone, **(own | kwargs))


CASES |= {
    "SimCLR hard learned": Case(LearnedSimCLR, plain={"head_norm": None}),
    "SimCLR masked scheduled": Case(
        lc.SimCLR,
        plain={"head_norm": None},
        indices=True,
        settings={"mask_same": "index", "temperature": lc.nn.ScheduledTemperature(0.5, 0.1, steps=6)},
    ),
}

HEADS = {"hidden_dim": 16, "projection_dim": 8}
QUEUE = {"queue_size": 24, "projection_dim": 8}
MIXES = {"hardest": 8, "pair_mixes": 6, "query_mixes": 4, "start_epoch": 1}
CASES |= {
    "MoCo": Case(lc.MoCo, settings=QUEUE),
    "MoCo symmetric": Case(lc.MoCo, settings=QUEUE | {"symmetric": True, "head_layers": 1, "weighting": "heated"}),
    "MoCo split": Case(lc.MoCo, settings=QUEUE | {"batchnorm_splits": 2}),
    "MoCo masked": Case(lc.MoCo, settings=QUEUE | {"mask_same": "label", "symmetric": True, "weighting": "debiased"}),
    "MoCoV3": Case(lc.MoCoV3, plain={"head_norm": None}, settings=HEADS),
    "BYOL": Case(lc.BYOL, plain={"head_norm": None}, settings=HEADS),
    "SimSiam": Case(lc.SimSiam, plain={"head_norm": None}, settings={"projection_dim": 8, "predictor_dim": 4}),
    "NPID": Case(lc.NPID, views=1, indices=True, settings={"num_samples": 32, "projection_dim": 8, "num_negatives": 0}),
    "NPID noise": Case(
        lc.NPID,
        plain={"num_negatives": 0},
        views=1,
        indices=True,
        settings={"num_samples": 32, "projection_dim": 8, "num_negatives": 5},
    ),
    "ExemplarCNN": Case(lc.ExemplarCNN, plain={"dropout": 0.0}, views=1, indices=True, settings={"num_samples": 32}),
    "ExemplarCNN drawn": Case(
        lc.ExemplarCNN,
        plain={"dropout": 0.0},
        views=1,
        indices=True,
        settings={"num_samples": 32, "num_negatives": 12},
    ),
    "NNCLR": Case(lc.NNCLR, plain={"head_norm": None}, settings=HEADS | {"queue_size": 24, "predictor_dim": 12}),
    "SupCon": Case(lc.SupCon, settings={"projection_dim": 8}),
    "SpectralContrastive": Case(lc.SpectralContrastive, plain={"head_norm": None}, settings=HEADS),
    "AlignUniform": Case(lc.AlignUniform, settings={"projection_dim": 8}),
    "SiameseMargin": Case(lc.SiameseMargin, plain={"miner": "hardest"}, settings={"projection_dim": 8}),
    "Triplet": Case(lc.Triplet, settings={"projection_dim": 8}),
    "Triplet labels": Case(lc.Triplet, settings={"projection_dim": 8, "use_labels": True, "miner": "hardest"}),
    "MoCHi": Case(lc.MoCHi, plain={"start_epoch": 9}, settings=QUEUE | MIXES),
}


class CellsDenseCL(lc.DenseCL):
    """Its cells are those of the second convolution, where the backbone is a module."""

    def __init__(self, backbone, **kwargs):
        layer = "layers.3" if isinstance(backbone, nn.Module) else None
        super().__init__(backbone, **({"region_layer": layer} | kwargs))


class PlacedVICRegL(lc.VICRegL):
    """The same; its views are plain tensors, whose places are read off their corners."""

    def __init__(self, backbone, **kwargs):
        layer = "layers.3" if isinstance(backbone, nn.Module) else None
        super().__init__(backbone, **({"region_layer": layer} | kwargs))

    def locations(self, views, grids):
        corners = [view.detach()[:, :, :2, :2].flatten(1)[:, :5].float().abs() for view in views]
        return [lc.augment.cell_locations(box, *grid) for box, grid in zip(corners, grids, strict=True)]


LOCAL = {"map_hidden_dim": 12, "map_projection_dim": 6, "matches": (2, 1)}
CASES |= {
    "DenseCL": Case(CellsDenseCL, settings=QUEUE),
    "VICRegL": Case(PlacedVICRegL, plain={"head_norm": None}, views=3, settings=HEADS | LOCAL),
    "VICRegL features": Case(
        PlacedVICRegL,
        plain={"head_norm": None},
        settings=HEADS | LOCAL | {"match_locations": False, "all_feature_matches": False},
    ),
}

CASES |= {"DINO": Case(lc.DINO, views=4, settings={"num_prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8})}

SWAV = HEADS | {"num_prototypes": 12, "freeze_prototypes_epochs": 1}
CASES |= {
    "BarlowTwins": Case(lc.BarlowTwins, plain={"head_norm": None}, settings=HEADS),
    "VICReg": Case(lc.VICReg, plain={"head_norm": None}, settings=HEADS),
    "SwAV": Case(
        lc.SwAV, plain={"head_norm": None}, views=4, settings=SWAV | {"queue_size": 16, "queue_start_epoch": 1}
    ),
    "SwAV no queue": Case(lambda *a, **k: lc.SwAV(*a, **k), plain={"head_norm": None}, settings=SWAV),
}

MASKS = {"min_keep": 2, "predictor_dim": 16, "predictor_depth": 1}
SAME_MASKS = {"target_scale": (1.0, 1.0), "target_aspect": (1.0, 1.0), "context_scale": (1.0, 1.0)}  # nothing to draw
CASES |= {
    "MSN": Case(
        lc.MSN,
        plain={"head_norm": None, "patch_drop": 0.0},
        views=4,
        settings=HEADS | {"num_prototypes": 12},
        backbone=tiny_vit,
    ),
    "IJEPA": Case(lc.IJEPA, plain=SAME_MASKS, views=1, settings=MASKS, backbone=tiny_patch_vit),
}

DISTILLED = {"num_prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8}
EVERYWHERE = {"mask_shape": "random", "mask_ratios": (1.0,), "mask_spreads": (0.0,)}  # draws nothing that ranks share
PATCHES = {"patch_bottleneck_dim": 6, "patch_lr_multiplier": 1.0}
CASES |= {
    "IBOT": Case(lc.IBOT, plain=EVERYWHERE, views=4, settings=DISTILLED, backbone=tiny_vit),
    "IBOT unshared": Case(lc.IBOT, plain=EVERYWHERE, settings=DISTILLED | {"shared_head": False}, backbone=tiny_vit),
    "DINOv2": Case(
        lc.DINOv2, plain={"mask_probability": 0.0}, views=4, settings=DISTILLED | PATCHES, backbone=tiny_vit
    ),
    "DINOv2 centres": Case(
        lc.DINOv2,
        plain={"mask_probability": 0.0},
        settings=DISTILLED | {"centering": "mean", "separate_heads": False, "layer_decay": 0.9},
        backbone=tiny_vit,
    ),
}

DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
MASKED = {"plain": {"mask": "grid", "mask_ratio": 0.75}, "views": 1, "backbone": tiny_vit}  # nothing to draw
CASES |= {
    "MAE": Case(lc.MAE, **MASKED, settings=DECODER),
    "SimMIM": Case(lc.SimMIM, **MASKED),
    "Data2Vec": Case(lc.Data2Vec, **MASKED, settings={"top_k": 1}),
}

GRAM = {"gram_start_epoch": 1, "gram_every_epochs": 1, "freeze_last_layer_epochs": 1}
CASES |= {
    "DINOv3": Case(
        lc.DINOv3,
        plain={"mask_probability": 0.0},
        views=4,
        settings=DISTILLED | GRAM | {"patch_lr_multiplier": 1.0},
        backbone=lambda norm: lc.nn.use_rope(tiny_vit()),
    )
}

PAIR = {"hidden_dim": 16, "projection_dim": 8}
PAIRED = {"plain": {"head_norm": None}, "argument": "encoder_a"}


class TwoEncoders(lc.PairContrast):
    """An encoder for each item, and an EMA of both."""

    def __init__(self, encoder_a, **kwargs):
        encoder_b = copy.deepcopy(encoder_a) if isinstance(encoder_a, nn.Module) else encoder_a
        super().__init__(encoder_a, encoder_b, **kwargs)


CASES |= {
    "PairContrast": Case(lc.PairContrast, **PAIRED, settings=PAIR),
    "PairContrast siglip": Case(lc.PairContrast, **PAIRED, settings=PAIR | {"loss": "siglip"}),
    "PairContrast masked": Case(
        lc.PairContrast, **PAIRED, indices=True, settings=PAIR | {"loss": "nt_xent", "mask_same": "index"}
    ),
    "PairContrast barlow": Case(lc.PairContrast, **PAIRED, settings=PAIR | {"loss": "barlow_twins"}),
    "PairContrast vicreg": Case(lc.PairContrast, **PAIRED, settings=PAIR | {"loss": "vicreg"}),
    "PairContrast byol": Case(TwoEncoders, **PAIRED, settings=PAIR | {"loss": "byol", "momentum": 0.9}),
    "PairContrast curl": Case(
        lc.PairContrast,
        argument="encoder_a",
        settings={"loss": "bilinear", "momentum": 0.9, "symmetric": False, "projection_dim": None},
    ),
}


class BoundPair(lc.BindModalities):
    """Two modalities with encoders of one kind."""

    def __init__(self, backbone, **kwargs):
        other = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else backbone
        kwargs["encoders"] = {"image": backbone, "depth": other}
        super().__init__(**kwargs)


BOUND = {"plain": {"head_norm": None}, "settings": PAIR}
CASES |= {
    "BindModalities": Case(BoundPair, **BOUND),
    "BindModalities masked": Case(
        BoundPair, **BOUND | {"settings": PAIR | {"mask_same": "index", "temperature": 0.2}}, indices=True
    ),
}


class CaptionedCLIP(lc.CLIP):
    """Reads tokens off the labels: the batches of the suites have no texts."""

    def batch_texts(self, batch):
        labels = lc.contracts.require_labels(batch, "CLIP")
        word = torch.arange(4, device=labels.device) + 97 + labels[:, None]
        ends = labels.new_full((len(labels), 1), 257)
        return torch.cat([ends, word, ends + 1], dim=1)


class CaptionedSigLIP(lc.SigLIP):
    """The same for SigLIP."""

    batch_texts = CaptionedCLIP.batch_texts


TEXTS = {"embedding_dim": 8, "context_length": 8, "text_kwargs": {"width": 16, "layers": 1, "heads": 2}}
CASES |= {
    "CLIP": Case(CaptionedCLIP, views=1, settings=TEXTS),
    "CLIP locked": Case(CaptionedCLIP, views=1, settings=TEXTS | {"locked_image": True, "mask_same": "text"}),
    "SigLIP": Case(CaptionedSigLIP, views=1, settings=TEXTS),
    "SigLIP masked": Case(CaptionedSigLIP, views=1, settings=TEXTS | {"mask_same": "text"}),
}


class CaptionedGLoRIA(lc.GLoRIA):
    """Reads two words off the labels; without BatchNorm its regions are those of the second convolution."""

    def __init__(self, backbone, **kwargs):
        layer = "layers.3" if isinstance(backbone, nn.Module) else None
        super().__init__(backbone, **({"region_layer": layer} | kwargs))

    def batch_texts(self, batch):
        labels = lc.contracts.require_labels(batch, "GLoRIA")
        word = torch.arange(2, device=labels.device) + 97 + labels[:, None]
        start = labels.new_full((len(labels), 1), 257)
        return torch.cat([start, word, labels.new_full((len(labels), 1), 33), word * 2 - 90, start + 1], dim=1)


WORDS = {"embedding_dim": 8, "context_length": 8, "text_kwargs": {"width": 16, "layers": 1, "heads": 2}}
CASES |= {
    "GLoRIA": Case(CaptionedGLoRIA, views=1, settings=WORDS),
    "GLoRIA mean": Case(
        CaptionedGLoRIA, views=1, indices=True, settings=WORDS | {"pieces": "mean", "mask_same": "label"}
    ),
}

GRID = {"patch_size": 8, "stride": 4, "context_layers": 1, "context_hidden_dim": 6, "target_dim": 5}  # 3 x 3 patches
CASES |= {
    "CPC": Case(lc.CPC, views=1, settings=GRID | {"steps": 2}),
    "CPC directions": Case(lc.CPC, views=1, settings=GRID | {"steps": 1, "skip": 1, "directions": "all"}),
}


class Stills(lc.SelfSupervisedModule):
    """Trains on clips of four frames that are made of one image each, since the suite's batches are images."""

    def batch_views(self, batch, count):
        return [torch.stack([view.roll(t, -1) for t in range(4)], 1) for view in super().batch_views(batch, count)]


class ContrastOfStills(Stills, lc.TemporalContrast):
    """Instance, local-local and global-local contrast."""


class CPCOfStills(Stills, lc.TemporalCPC):
    """Predictions of the frames that follow."""


AHEAD = {"steps": 2, "context_dim": 5}

CASES |= {
    "TemporalContrast": Case(
        ContrastOfStills, plain={"head_norm": None}, views=6, settings={"local_clips": 2, "projection_dim": 8}
    ),
    "TemporalContrast instance": Case(
        ContrastOfStills, plain={"head_norm": None}, settings={"local_weight": 0.0, "global_local_weight": 0.0}
    ),
    "TemporalCPC": Case(CPCOfStills, plain={"negatives": None}, views=1, settings=AHEAD | {"negatives": 6}),
    "TemporalCPC all": Case(CPCOfStills, views=1, settings=AHEAD | {"negatives": None}),
}


VIEWS = {"plain": {"head_norm": None}}
CASES |= {
    "LeJEPA": Case(lc.LeJEPA, **VIEWS, settings=HEADS | {"num_slices": 16}),
    "VISReg": Case(lc.VISReg, **VIEWS, views=3, settings=HEADS | {"num_slices": 16}),
    "TiCo": Case(lc.TiCo, **VIEWS, settings=HEADS),
    "WMSE": Case(
        lc.WMSE, **VIEWS, settings=HEADS | {"projection_dim": 2, "whitening_iterations": 2, "whitening_eps": 0.1}
    ),
    "MMCR": Case(lc.MMCR, **VIEWS, views=4, settings=HEADS),
    "MMCR momentum": Case(lc.MMCR, **VIEWS, settings=HEADS | {"momentum": 0.9, "local_weight": 0.1}),
}


class VJEPAOfStills(lc.VJEPA):
    """On clips of four frames that are made of one image each."""

    def batch_views(self, batch, count):
        return [torch.stack([view.roll(t, -1) for t in range(4)], 1) for view in super().batch_views(batch, count)]


def tiny_video_vit(norm: bool = True):
    """A transformer of clips of four frames of 16 pixels; it has no BatchNorm anyway."""
    return lc.nn.TubeletViT(frames=4, img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)


def same_tubelets(clips, grid, generator=None):
    """Hide the same tubelets in every clip."""
    return (torch.arange(32) % 3 != 0).expand(clips, -1)


CASES |= {
    "VJEPA": Case(
        VJEPAOfStills,
        plain={"masks": [same_tubelets]},
        views=1,
        settings={"predictor_dim": 16, "predictor_depth": 1, "predictor_heads": 2, "final_lr": 1e-7},
        backbone=tiny_video_vit,
    ),
}


class Tutor(TinyBackbone):
    """A teacher in float64, its own precision, whose features do not depend on how a batch is split between ranks."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            super().__init__()
        self.double()

    def forward(self, images):
        return 9 * super().forward(images)


class TaughtDistill(lc.Distill):
    """Brings its teacher: a checkpoint does not hold constructor arguments that are modules."""

    def __init__(self, backbone, **kwargs):
        super().__init__(backbone, **({"teacher": Tutor()} | kwargs))


class TaughtSEED(lc.SEED):
    """The same for SEED."""

    def __init__(self, backbone, **kwargs):
        super().__init__(backbone, **({"teacher": Tutor()} | kwargs))


TAUGHT = {"plain": {"head_norm": None}, "views": 1}
CASES |= {
    "Distill": Case(TaughtDistill, **TAUGHT),
    "Distill compress": Case(TaughtDistill, **TAUGHT, settings={"loss": "compress", "queue_size": 24}),
    "Distill compress momentum": Case(
        TaughtDistill, **TAUGHT, settings={"loss": "compress_momentum", "queue_size": 24, "momentum": 0.9}
    ),
    "Distill compress one": Case(TaughtDistill, **TAUGHT, settings={"loss": "compress_one_queue", "queue_size": 24}),
    "Distill crd": Case(
        TaughtDistill,
        plain={"num_negatives": 0},
        views=1,
        indices=True,
        settings={"loss": "crd", "num_samples": 32, "num_negatives": 5},
    ),
    "Distill disco": Case(TaughtDistill, settings={"loss": "disco", "queue_size": 24}),
    "Distill features cached": Case(
        TaughtDistill,
        views=1,
        indices=True,
        settings={"loss": "features", "cache_features": True, "num_samples": 32},
    ),
    "Distill rkd": Case(TaughtDistill, views=1, settings={"loss": "rkd"}),
    "SEED": Case(TaughtSEED, views=1, settings={"queue_size": 24}),
    "SEED small crops": Case(TaughtSEED, views=3, settings={"queue_size": 24, "small_crops": 2}),
}


class AttackedRoCL(lc.RoCL):
    """Maps views of any range to 0..1: those of the suites are not pixels."""

    def batch_views(self, batch, count):
        return [upcast(view).sigmoid().to(view.dtype) for view in super().batch_views(batch, count)]


CASES |= {
    "RoCL": Case(
        AttackedRoCL, plain={"random_start": False}, settings={"hidden_dim": 16, "projection_dim": 8, "steps": 2}
    )
}


def make(name: str, *, norm: bool = True, **kwargs) -> L.LightningModule:
    """Build a case with seeded weights; ``norm=False`` leaves BatchNorm out everywhere."""
    torch.manual_seed(0)
    case = CASES[name]
    settings = (
        {"optimizer": "sgd", "lr": 0.05, "warmup_epochs": 0} | case.settings | ({} if norm else case.plain) | kwargs
    )
    return case.make(case.backbone(norm), **settings)


def fill_queue(module: L.LightningModule) -> L.LightningModule:
    """Put seeded rows into every queue, as steps before would have: without negatives the loss is constant."""
    queues = module.queues() if hasattr(module, "queues") else {}
    for queue in queues.values():
        if isinstance(queue, FeatureQueue):
            rows = torch.randn(queue.size - 4, queue.dim, generator=torch.Generator().manual_seed(1))
            queue.push(rows, None if queue.labels is None else torch.arange(len(rows)) % 4 - 1)
    return module
