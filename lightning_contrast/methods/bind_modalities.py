"""BindModalities: several modalities, each contrasted with one anchor only, share a space (ImageBind's scheme).

Paper: https://arxiv.org/abs/2305.05665. Its training code is not public; the loss here is Eq. 1 in both directions.
Differs from it: any encoders, trained from scratch unless ``frozen``; the temperature of each modality is learned
unless given, where the released model has fixed multipliers (image 1, audio 20, depth 5, thermal 10, IMU 5).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack, cast

import torch
from torch import Tensor, nn

from lightning_contrast import distributed
from lightning_contrast._checks import check_batch, check_choice, fail, require
from lightning_contrast.augment import simclr_views
from lightning_contrast.losses import clip_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, sample_ids
from lightning_contrast.nn import BackboneOptions, Norm, build_backbone, build_head
from lightning_contrast.nn.temperature import LearnedTemperature, check_temperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows


class BindModalities(SelfSupervisedModule):
    """Contrast each modality with the anchor; two others meet through it, without a pair of them.

    A batch is a dict with the anchor and at least one other modality by name, each with one row per sample; or a list
    of tensors in the order of ``encoders`` (also as ``([...], labels, index)``). A modality that a batch lacks, or has
    as None, adds nothing to the loss of that step, so that datasets of different pairs can be mixed; a loss is the mean
    over the modalities present. All ranks must hold the same modalities in a step, which is checked, and DDP needs
    ``strategy="ddp_find_unused_parameters_true"`` if some are absent. An entry is given to its encoder as it is.
    `forward` gives the features (B, F) of the anchor, and `encode` the embeddings of any modality.

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
        mask_same: Samples with the same "label" or "index" are not negatives of each other.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 0.001 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: `BackboneOptions` of the anchor's encoder.

    Raises:
        ValueError: If a name is unknown, or the widths without heads differ. In a step: if the anchor or all other
            modalities are missing, a modality has another number of rows, or ranks hold different modalities.
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
        mask_same: SameImages | None = None,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[BackboneOptions],
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
        if projection_dim is None:
            hint = "Set `projection_dim`, or give encoders of one width"
            require(len(set(widths.values())) == 1, "encoders", "have features of one width", widths, hint)
        for name, width in widths.items():
            settings: Any = {"hidden_dim": hidden_dim, "out_dim": projection_dim, "norm": head_norm}
            head = nn.Identity() if projection_dim is None else build_head("simclr", width, **settings)
            self.add_module(f"projector_{name}", head)
        self._add_temperatures(temperature)
        self.frozen = tuple(frozen)
        for name in self.frozen:
            check_choice("frozen", name, self.modalities)
            self.encoder(name).requires_grad_(False).eval()
        self.save_hyperparameters()

    def _add_temperatures(self, temperature: float | dict[str, float] | None) -> None:
        others = [name for name in self.modalities if name != self.anchor]
        given = temperature if isinstance(temperature, Mapping) else dict.fromkeys(others, temperature)
        for name in given:
            check_choice("temperature", name, others)
        self.temperatures = {name: value for name, value in given.items() if value is not None}
        for name in others:
            if name in self.temperatures:
                check_temperature(self.temperatures[name])
            else:
                self.add_module(f"temperature_{name}", LearnedTemperature())

    def train(self, mode: bool = True) -> "BindModalities":
        """Set the training mode; frozen encoders stay in evaluation mode."""
        super().train(mode)
        for name in getattr(self, "frozen", ()):
            self.encoder(name).eval()
        return self

    def encoder(self, name: str) -> nn.Module:
        """Return the encoder of a modality."""
        check_choice("name", name, self.modalities)
        return self.backbone if name == self.anchor else cast("nn.Module", getattr(self, f"encoder_{name}"))

    def encode(self, name: str, items: Any) -> Tensor:
        """Return the embeddings (B, D) of items (B, ...) of a modality, unit rows."""
        return unit_rows(self._project(name, self.encoder(name)(items)))

    def _project(self, name: str, features: Tensor) -> Tensor:
        return getattr(self, f"projector_{name}")(features)  # type: ignore[no-any-return]  # nn.Module.__call__

    def images(self, batch: Any) -> Any:
        """Return the anchor's items (B, ...) of an evaluation batch: by its name, else the images."""
        if isinstance(batch, Mapping) and self.anchor in batch:
            return batch[self.anchor]
        return super().images(batch)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the mean over the present modalities of their loss with the anchor, and the features (B, F)."""
        items = self.items(batch)
        groups = sample_ids(batch, self.mask_same, "BindModalities")  # (B,)
        features = self.backbone(items.pop(self.anchor))  # (B, F)
        anchor = self._project(self.anchor, features)  # (B, D)
        losses = []
        for name, item in items.items():
            embedding = self._project(name, self.encoder(name)(item))  # (B, D)
            fixed = self.temperatures.get(name)
            temperature = getattr(self, f"temperature_{name}")() if fixed is None else fixed
            losses.append(clip_loss(anchor, embedding, logit_scale=1 / temperature, groups=groups))
            self.log(f"train/loss_{name}", losses[-1], batch_size=len(features))
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss, batch_size=len(features))
        return {"loss": loss, "features": features.detach()}

    def items(self, batch: Any) -> dict[str, Any]:
        """Return the modalities that a batch holds by name, the anchor among them, each with B rows."""
        if isinstance(batch, Mapping):
            found = {name: batch[name] for name in self.modalities if batch.get(name) is not None}
        else:
            nested = isinstance(batch, list | tuple) and len(batch) > 0 and isinstance(batch[0], list | tuple)
            views = batch[0] if nested else batch
            ok = isinstance(views, list | tuple) and len(views) == len(self.modalities)
            got = len(views) if isinstance(views, list | tuple) else type(views).__name__
            hint = "Yield a dict by modality, or a list in the order of `encoders`"
            require(ok, "batch", f"hold the modalities {', '.join(self.modalities)}", got, hint)
            found = {name: item for name, item in zip(self.modalities, views, strict=True) if item is not None}
        present = sum(2**place for place, name in enumerate(self.modalities) if name in found)
        hint = "Let all ranks read the same dataset in a step; the value is the sum of 2**i over the modalities i"
        distributed.check_equal("modalities of the batch", present, hint, self.device)
        require(self.anchor in found, "batch", f"hold the anchor {self.anchor!r}", [*found], "Each pair needs it")
        hint = f"Yield {self.anchor!r} with at least one other modality"
        require(len(found) > 1, "batch", f"hold a modality besides {self.anchor!r}", [*found], hint)
        sizes = {name: len(item) for name, item in found.items()}
        hint = "Yield one row of each modality per sample; leave a modality out of the whole batch if rows lack it"
        require(len(set(sizes.values())) == 1, "batch", "hold as many rows of each modality", sizes, hint)
        check_batch("batch", sizes[self.anchor], 1 if distributed.is_distributed() else 2)
        return found
