"""BindModalities: several modalities, each contrasted with one anchor only, share a space (ImageBind's scheme).

Paper: https://arxiv.org/abs/2305.05665. Its training code is not public; the loss here is Eq. 1 in both directions.
Differs from it: any encoders, trained from scratch unless ``frozen``; the temperature of each modality is learned
unless given, where the released model has fixed multipliers (image 1, audio 20, depth 5, thermal 10, IMU 5).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import check_captions, check_choice, fail, require
from lightning_contrast.augment import simclr_views
from lightning_contrast.losses import clip_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, sample_ids
from lightning_contrast.nn import Norm, build_backbone, build_head
from lightning_contrast.nn.byte_tokenizer import Tokenizer
from lightning_contrast.nn.temperature import LearnedTemperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows, upcast
from lightning_contrast.runtime.aligned_items import check_absence, no_rows, require_modalities
from lightning_contrast.runtime.frozen_parts import FrozenParts
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.seeding import send


class BindModalities(FrozenParts, SelfSupervisedModule):
    """Contrast each modality with the anchor; two others meet through it, without a pair of them.

    A batch is a dict with the anchor and at least one other modality by name, each with one row per sample; or a list
    of tensors in the order of ``encoders`` (also as ``([...], labels, index)``). A list of tensors under "image" holds
    the first modalities in that order, if none is named "image". A modality that a batch lacks, or has
    as None, adds nothing to the loss of that step, so that datasets of different pairs can be mixed; a loss is the mean
    over the modalities present. If only some ranks lack one, its loss is over the rows of the others, as in one process
    (not with SyncBatchNorm or FSDP). If all ranks do, its encoder gets no gradient, and DDP needs
    ``strategy="ddp_find_unused_parameters_true"``. On several ranks each step first exchanges and reads which of them
    has what, for which an accelerator waits. An entry is given to its encoder as it is. `forward` gives the features
    (B, F) of the anchor, and `encode` the embeddings of any modality.

    Args:
        encoders: For each modality the name of a timm model, or a module that maps its items (B, ...) to features
            (B, F) and has their width as ``num_features``. At least two; names are identifiers.
        anchor: The modality that all others are paired with; the attribute ``backbone``.
        temperature: Divisor of the cosine similarities for each modality but the anchor. None: learned, from 0.07; a
            number for all; or a dict of numbers by name, in which those left out are learned.
        projection_dim: D, the width of the embeddings; None uses the features without heads.
        hidden_dim: Width of the heads' hidden layer.
        head_norm: Norm of the heads' hidden layer, "batch", "layer" or None.
        frozen: Modalities whose encoders are not trained and stay in evaluation mode; their heads are trained.
        tokenizers: For modalities that batches hold as lists of B str, a function of them that returns int64 tokens
            (B, L) for the encoder.
        mask_same: Samples with the same "label" or "index" are not negatives of each other.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 0.001 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`; the network options are those of the anchor's encoder.

    Raises:
        ValueError: If a name is unknown, or the widths without heads differ. In a step: if the anchor or all other
            modalities are missing, a modality has another number of rows, or with SyncBatchNorm or FSDP the ranks hold
            different modalities.
    """

    base_lr: ClassVar[float] = 1e-3
    views = staticmethod(simclr_views)

    def __init__(
        self,
        encoders: Mapping[str, str | nn.Module],
        anchor: str = "image",
        *,
        temperature: float | dict[str, float] | None = None,
        projection_dim: int | None = 128,
        hidden_dim: int = 512,
        head_norm: Norm = "batch",
        frozen: Sequence[str] = (),
        tokenizers: Mapping[str, Tokenizer] | None = None,
        mask_same: SameImages | None = None,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        if not isinstance(encoders, Mapping):
            hint = 'Give for example {"image": "resnet18", "depth": DepthNet()}'
            fail("encoders", "be a dict of encoders by modality", type(encoders).__name__, hint, TypeError)
        require(len(encoders) > 1, "encoders", "hold at least two modalities", [*encoders], "Add one")
        check_choice("anchor", anchor, encoders)
        super().__init__(
            encoders[anchor],
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            warmup_epochs=warmup_epochs,
            **options,
        )
        self.modalities, self.anchor, self.mask_same = tuple(encoders), anchor, check_mask_same(mask_same)
        widths = {anchor: self.feature_dim}
        for name in self.modalities:
            hint = "It becomes part of an attribute's name: use letters, digits and _"
            require(isinstance(name, str) and name.isidentifier(), "encoders", "have identifiers as keys", name, hint)
            if name != anchor:  # attributes and not a ModuleDict, which FSDP2 cannot shard: it has no forward
                encoder, widths[name] = build_backbone(encoders[name])
                self.add_module(f"encoder_{name}", encoder)
        dims = set(widths.values()) if projection_dim is None else {projection_dim}
        hint = "Set `projection_dim`, or give encoders of one width"
        require(len(dims) == 1, "encoders", "have features of one width", widths, hint)
        head: Any = {"hidden_dim": hidden_dim, "out_dim": projection_dim, "norm": head_norm}
        for name, width in widths.items():
            projector = nn.Identity() if projection_dim is None else build_head("simclr", width, **head)
            self.add_module(f"projector_{name}", projector)
        others = [name for name in self.modalities if name != anchor]
        given = temperature if isinstance(temperature, Mapping) else dict.fromkeys(others, temperature)
        for name in [*given, *others]:
            check_choice("temperature", name, others)
            value = given.get(name)
            ok = value is None or (isinstance(value, int | float) and value > 0)
            require(ok, "temperature", "be > 0, or None for a learned one", value, "Give a number above 0")
            setattr(self, f"temperature_{name}", LearnedTemperature() if value is None else value)
        self.tokenizers = dict(tokenizers or {})
        for name, tokenizer in self.tokenizers.items():
            check_choice("tokenizers", name, self.modalities)
            hint = "Give functions of a list of str that return int64 tokens (B, L)"
            require(callable(tokenizer), "tokenizers", "be callable", type(tokenizer).__name__, hint)
        for name in frozen:
            check_choice("frozen", name, self.modalities)
            self.freeze_parts("backbone" if name == anchor else f"encoder_{name}")
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean over the present modalities of their loss with the anchor, and the features (B, F)."""
        items, ranks = require_modalities(batch, self.modalities, self.anchor, self.device)
        items = {name: self.tokenize(name, item) for name, item in items.items()}
        check_absence(ranks, self)
        groups = sample_ids(batch, self.mask_same, "BindModalities")  # (B,)
        features = self.backbone(items[self.anchor])  # (B, F)
        anchor = getattr(self, f"projector_{self.anchor}")(features)  # (B, D)
        losses = []
        for name in ranks:
            encoder, projector = self.encoder(name), getattr(self, f"projector_{name}")
            rows = slice(len(features) if name in items else 0)
            embedding = projector(encoder(items[name])) if name in items else no_rows(anchor, encoder, projector)
            temperature = getattr(self, f"temperature_{name}")
            scale = 1 / (upcast(temperature()) if isinstance(temperature, nn.Module) else temperature)
            own = None if groups is None else groups[rows]  # as the anchor's rows: all or none
            losses.append(clip_loss(anchor[rows], embedding, logit_scale=scale, groups=own))
            self.log(f"train/loss_{name}", losses[-1], batch_size=len(features))
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, batch_size=len(features))
        return {"loss": loss, "features": features.detach()}

    def encoder(self, name: str) -> Any:
        """Return the encoder of a modality."""
        check_choice("name", name, self.modalities)
        return self.backbone if name == self.anchor else getattr(self, f"encoder_{name}")

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of strings it would compile one step per batch
    def tokenize(self, name: str, items: Any) -> Any:
        """Return the tokens (B, L) of B str of a modality with a tokenizer; other items unchanged."""
        if name not in self.tokenizers or isinstance(items, Tensor):
            return items
        return send(self.tokenizers[name](check_captions(items)), self.device)

    def encode(self, name: str, items: Any) -> Tensor:
        """Return the embeddings (B, D) of items (B, ...), or of B texts, of a modality, unit rows."""
        return unit_rows(getattr(self, f"projector_{name}")(self.encoder(name)(self.tokenize(name, items))))

    def images(self, batch: Any) -> Any:
        """Return the anchor's items (B, ...) of an evaluation batch: by its name, else the images."""
        named = isinstance(batch, Mapping) and self.anchor in batch
        return self.tokenize(self.anchor, batch[self.anchor]) if named else super().images(batch)

    @property
    def cached_modules(self) -> tuple[str, ...]:
        """The submodules that a `GradientCache` runs in chunks: the encoders."""
        return ("backbone", *(f"encoder_{name}" for name in self.modalities if name != self.anchor))
