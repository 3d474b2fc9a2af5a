"""PairContrast: two aligned items of any kind, such as two sensors or two renderings, under any loss by name.

There is no single paper: the losses are those of `losses`, each with its own source. With ``loss="bilinear"``, no heads
and a momentum encoder it is CURL (https://arxiv.org/abs/2004.04136); with the points of two partial views as rows and
``loss="info_nce"`` it is PointContrast (https://arxiv.org/abs/2007.10985).
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast._checks import require
from lightning_contrast.augment import simclr_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.losses.pair_losses import pair_loss
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, sample_ids
from lightning_contrast.nn import Backbone, Norm, build_backbone, build_head
from lightning_contrast.nn.logit_scale import BilinearWeight, LogitBias
from lightning_contrast.nn.temperature import LearnedTemperature, Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.aligned_items import check_keys, require_pair
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.runtime.temperature import current_temperature


class PairContrast(SelfSupervisedModule):
    """Bring the embeddings of two aligned items together, with one encoder for both or one for each.

    A batch holds two items with one row per pair: ``(a, b)`` (floating tensors), ``([a, b], labels, index)``, a dict
    with two views as ``"image"``, or with ``keys`` a dict with an entry for each item. Items may differ in shape if
    each has its own encoder. `forward` gives the features (B, F) of items a; `encode_a` and `encode_b` the embeddings.

    Args:
        encoder_a: Name of a timm model, or a module that maps items a (B, ...) to features (B, F); the attribute
            ``backbone``.
        encoder_b: The same for items b, or the result of `nn.build_backbone`; the attribute ``backbone_b``. None uses
            ``encoder_a`` and its head for both.
        loss: "info_nce" (both directions, as in CLIP), "nt_xent", "siglip", "barlow_twins", "vicreg", "spectral",
            "byol" or "bilinear" (CURL's).
        loss_options: Weights of the loss that differ from its defaults, such as ``{"covariance_weight": 4.0}``.
        temperature: Divisor of the cosine similarities of "info_nce", "nt_xent" and "siglip". None: learned, from 0.07,
            0.1 and 0.1. A number, `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the step.
        momentum: None: both embeddings get gradient. A number in [0, 1]: items b are compared as the EMA of their
            encoder embeds them, without gradient. "byol" needs one; CURL has 0.95, constant; the one here rises to 1.
        symmetric: With ``momentum``: also compare items b with the EMA embeddings of items a, and average both losses.
            False, as in CURL, is for one encoder: a second one would get no gradient.
        hidden_dim: Width of the heads' hidden layers.
        projection_dim: D, the width of the embeddings; None uses the features without heads.
        head_norm: Norm of the heads' hidden layers, "batch", "layer" or None.
        keys: Entries of a dict batch that hold items a and b.
        mask_same: Pairs with the same "label" or "index" are not negatives ("info_nce", "nt_xent" and "siglip").
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 0.001 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`; the network options are those of ``encoder_a``.

    Raises:
        ValueError: If an argument does not belong to the loss, or the widths without heads differ. In a step: if an
            item is missing in the batch, or the two have different numbers of rows.
    """

    base_lr: ClassVar[float] = 1e-3
    views = staticmethod(simclr_views)

    def __init__(
        self,
        encoder_a: str | nn.Module,
        encoder_b: str | nn.Module | Backbone | None = None,
        *,
        loss: str = "info_nce",
        loss_options: dict[str, float] | None = None,
        temperature: Temperature | None = None,
        momentum: float | None = None,
        symmetric: bool = True,
        hidden_dim: int = 512,
        projection_dim: int | None = 128,
        head_norm: Norm = "batch",
        keys: tuple[str, str] | None = None,
        mask_same: SameImages | None = None,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            encoder_a, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        self.mask_same, self.keys = check_mask_same(mask_same), check_keys(keys)
        self.momentum, self.symmetric, self.two_encoders = momentum, symmetric, encoder_b is not None
        self.pair_loss, self.weights = pair_loss(loss, loss_options, temperature, momentum, self.mask_same)
        one_way = momentum is not None and encoder_b is None
        require(symmetric or one_way, "symmetric", "be True without `momentum` or with `encoder_b`", False, "Omit it")
        widths = {"": self.feature_dim}  # by the ending of the networks' names
        if encoder_b is not None:
            built = encoder_b if isinstance(encoder_b, Backbone) else build_backbone(encoder_b)
            self.backbone_b, widths["_b"] = built
        dim = self.feature_dim if projection_dim is None else projection_dim
        head: Any = {"hidden_dim": hidden_dim, "out_dim": dim, "norm": head_norm}
        for ending, width in widths.items():
            hint = "Set `projection_dim`, or give encoders of one width"
            fits = projection_dim is not None or width == dim
            require(fits, "encoder_b", f"have {dim} features, as encoder_a", width, hint)
            projector = nn.Identity() if projection_dim is None else build_head(self.pair_loss.head, width, **head)
            self.add_module(f"projector{ending}", projector)
            if self.pair_loss.predictor:
                self.add_module(f"predictor{ending}", build_head(self.pair_loss.head, dim, **head))
            for name in () if momentum is None else (f"backbone{ending}", f"projector{ending}"):
                self.add_module(f"momentum_{name}", copy.deepcopy(getattr(self, name)).requires_grad_(False))
        if self.pair_loss.temperature is not None:
            learned = LearnedTemperature(self.pair_loss.temperature)
            self.temperature = check_temperature(learned if temperature is None else temperature)
        self.logit_bias = None if self.pair_loss.logit_bias is None else LogitBias(self.pair_loss.logit_bias, lr=1e-3)
        self.bilinear = BilinearWeight(dim) if self.pair_loss.bilinear else None
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of the pairs, and the features (B, F) of items a."""
        a, b = require_pair(batch, self.keys)
        function, arguments = self.pair_loss.function, self.loss_arguments(batch)
        features = self.backbone(a)  # (B, F)
        z_a = self.network("projector", "a")(features)  # (B, D)
        if self.momentum is None:
            loss = function(z_a, self.project(b, "b"), **arguments)
        else:
            loss = function(self.predict(z_a, "a"), self.target(b, "b"), **arguments)
            if self.symmetric:
                query = self.predict(self.project(b, "b"), "b")  # (B, D)
                loss = 0.5 * (loss + function(query, self.target(a, "a"), **arguments))
        self.log("train/loss", loss, batch_size=len(features))
        return {"loss": loss, "features": features.detach()}

    def loss_arguments(self, batch: Any) -> dict[str, Any]:
        """Return what the loss takes besides two embeddings: weights, learned parameters, and groups (B,)."""
        arguments: dict[str, Any] = dict(self.weights)
        if self.pair_loss.temperature is not None:
            arguments |= self.pair_loss.scaled(current_temperature(self))
        if self.pair_loss.groups:
            arguments["groups"] = sample_ids(batch, self.mask_same, "PairContrast")
        if self.logit_bias is not None:
            arguments["logit_bias"] = self.logit_bias()
        if self.bilinear is not None:
            arguments["weight"] = self.bilinear()
        return arguments

    def network(self, part: str, side: str, prefix: str = "") -> Any:
        """Return the "backbone", "projector" or "predictor" of items "a" or "b"; of ``prefix="momentum_"`` the EMA."""
        return getattr(self, f"{prefix}{part}{'_b' if side == 'b' and self.two_encoders else ''}")

    def project(self, items: Any, side: str, prefix: str = "") -> Tensor:
        """Return the projections (B, D) of items (B, ...) of a side, "a" or "b"."""
        features = self.network("backbone", side, prefix)(items)  # (B, F)
        return self.network("projector", side, prefix)(features)  # type: ignore[no-any-return]  # nn.Module.__call__

    def predict(self, projection: Tensor, side: str) -> Tensor:
        """Return what is compared with a target, (B, D): the prediction, or the projection if the loss has none."""
        return self.network("predictor", side)(projection) if self.pair_loss.predictor else projection

    @torch.no_grad()
    def target(self, items: Any, side: str) -> Tensor:
        """Return the projections (B, D) of items (B, ...) by the momentum networks."""
        return self.project(items, side, "momentum_")

    def encode_a(self, items: Any) -> Tensor:
        """Return the embeddings (B, D) of items a (B, ...), unit rows."""
        return unit_rows(self.project(items, "a"))

    def encode_b(self, items: Any) -> Tensor:
        """Return the embeddings (B, D) of items b (B, ...), unit rows."""
        return unit_rows(self.project(items, "b"))

    def images(self, batch: Any) -> Any:
        """Return items a of an evaluation batch: of a dict with ``keys`` the first, else the images (B, ...)."""
        if self.keys is not None and isinstance(batch, Mapping) and self.keys[0] in batch:
            return batch[self.keys[0]]
        return super().images(batch)

    @property
    def cached_modules(self) -> tuple[str, ...]:
        """The submodules that a `GradientCache` runs in chunks: the encoders."""
        return ("backbone", "backbone_b") if self.two_encoders else ("backbone",)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, momentum) modules; none without ``momentum``."""
        found = dict(self.named_children())
        pairs = [(found[name], found[f"momentum_{name}"]) for name in found if f"momentum_{name}" in found]
        return [pair for pair in pairs if list(pair[0].parameters())]

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback if there is a momentum network."""
        return [] if self.momentum is None else [MomentumUpdate(self.momentum)]
