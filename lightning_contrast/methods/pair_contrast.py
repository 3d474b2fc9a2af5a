"""PairContrast: two aligned items of any kind, such as two sensors or two renderings, under any loss by name.

There is no single paper: the losses are those of `losses`, each with its own source. With ``loss="bilinear"``, no heads
and a momentum encoder it is CURL (https://arxiv.org/abs/2004.04136); with the points of two partial views as rows and
``loss="info_nce"`` it is PointContrast (https://arxiv.org/abs/2007.10985).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Unpack

import lightning as L
import torch
from torch import Tensor, nn

from lightning_contrast import distributed, losses
from lightning_contrast._checks import check_batch, check_choice, check_probability, fail, require
from lightning_contrast.augment import simclr_views
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.contracts import split_batch
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, sample_ids
from lightning_contrast.nn import BackboneOptions, Norm, build_backbone, build_head
from lightning_contrast.nn.logit_scale import LogitBias
from lightning_contrast.nn.temperature import LearnedTemperature, Temperature, check_temperature
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.temperature import current_temperature


@dataclass(frozen=True)
class PairLoss:
    """A loss of two embeddings ``(B, D)`` and what it needs around it.

    Attributes:
        function: ``function(z_a, z_b, **options)`` returns a scalar.
        head: Projection head of `nn.build_head`.
        options: Further arguments of the function and their defaults.
        temperature: Start of the learned temperature; None: the loss has no temperature.
        scale_name: How the function takes it: "temperature", or "logit_scale", its inverse.
        predictor: Whether online embeddings pass a predictor, to be compared with those of a momentum network.
        groups: Whether the function takes groups of false negatives.
    """

    function: Callable[..., Tensor]
    head: str = "simclr"
    options: dict[str, float] = field(default_factory=dict)
    temperature: float | None = None
    scale_name: str = "logit_scale"
    predictor: bool = False
    groups: bool = False


LOSSES = {
    "info_nce": PairLoss(losses.clip_loss, temperature=0.07, groups=True),
    "nt_xent": PairLoss(losses.nt_xent, temperature=0.1, scale_name="temperature", groups=True),
    "siglip": PairLoss(losses.siglip_loss, temperature=0.1),
    "barlow_twins": PairLoss(losses.barlow_twins_loss, "barlow_twins", {"off_diagonal_weight": 0.0051}),
    "vicreg": PairLoss(
        losses.vicreg_loss,
        "vicreg",
        {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0},
    ),
    "spectral": PairLoss(losses.spectral_contrastive_loss, "spectral", {"mu": 1.0}),
    "byol": PairLoss(losses.byol_loss, "byol", predictor=True),
    "bilinear": PairLoss(losses.bilinear_loss),
}
"""The losses by name; "bilinear" is CURL's."""


class BilinearWeight(nn.Module):
    """CURL's matrix W, drawn uniformly from [0, 1).

    Args:
        dim: D, the width of the embeddings.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(dim, dim))

    def forward(self) -> Tensor:
        """Return the matrix, (D, D)."""
        return self.weight * 1.0  # a new tensor: FSDP2 shards the parameter again after the pass


class PairContrast(SelfSupervisedModule):
    """Bring the embeddings of two aligned items together, with one encoder for both or one for each.

    A batch holds two items with one row per pair: ``(a, b)`` (floating tensors), ``([a, b], labels, index)``, a dict
    with two views as ``"image"``, or with ``keys`` a dict with an entry for each item. Items may differ in shape if
    each has its own encoder. `forward` gives the features (B, F) of items a; `encode_a` and `encode_b` the embeddings.

    Args:
        encoder_a: Name of a timm model, or a module that maps items a (B, ...) to features (B, F); the attribute
            ``backbone``.
        encoder_b: The same for items b; None uses ``encoder_a`` and its head for both.
        loss: "info_nce" (both directions, as in CLIP), "nt_xent", "siglip", "barlow_twins", "vicreg", "spectral",
            "byol" or "bilinear" (CURL's).
        loss_options: Weights of the loss that differ from its defaults, such as ``{"covariance_weight": 4.0}``.
        temperature: Divisor of the cosine similarities of "info_nce", "nt_xent" and "siglip". None: learned, from 0.07,
            0.1 and 0.1. A number, `nn.LearnedTemperature`, `nn.ScheduledTemperature`, or a function of the step.
        logit_bias: Start of SigLIP's learned bias.
        momentum: None: both embeddings get gradient. A number in [0, 1]: items b are embedded by an EMA of their
            encoder without gradient. "byol" needs one; CURL has 0.95, constant, where the one here rises to 1.
        symmetric: With ``momentum``: also compare items b with the EMA embeddings of items a, and average both losses.
        hidden_dim: Width of the heads' hidden layers.
        projection_dim: D, the width of the embeddings; None uses the features without heads.
        head_norm: Norm of the heads' hidden layers, "batch", "layer" or None.
        keys: Entries of a dict batch that hold items a and b.
        mask_same: Pairs with the same "label" or "index" are not negatives of each other ("info_nce" and "nt_xent").
        encoder_b_options: `BackboneOptions` of ``encoder_b``.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute; None is 0.001 x global batch / 256.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: `BackboneOptions` of ``encoder_a``.

    Raises:
        ValueError: If an argument does not belong to the loss, or the widths without heads differ. In a step: if an
            item is missing in the batch, or the two have different numbers of rows.
    """

    base_lr: ClassVar[float] = 1e-3
    views = staticmethod(simclr_views)

    def __init__(
        self,
        encoder_a: str | nn.Module,
        encoder_b: str | nn.Module | None = None,
        *,
        loss: str = "info_nce",
        loss_options: dict[str, float] | None = None,
        temperature: Temperature | None = None,
        logit_bias: float = -10.0,
        momentum: float | None = None,
        symmetric: bool = True,
        hidden_dim: int = 512,
        projection_dim: int | None = 128,
        head_norm: Norm = "batch",
        keys: tuple[str, str] | None = None,
        mask_same: SameImages | None = None,
        encoder_b_options: BackboneOptions | None = None,
        optimizer: OptimizerLike = "adamw",
        lr: float | None = None,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 0,
        **options: Unpack[BackboneOptions],
    ) -> None:
        super().__init__(
            encoder_a, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_choice("loss", loss, LOSSES)
        self.loss, self.kind, self.symmetric = loss, LOSSES[loss], symmetric
        self._check_arguments(temperature, momentum, mask_same, encoder_b, encoder_b_options)
        for name in loss_options or {}:
            check_choice("loss_options", name, self.kind.options)
        self.loss_options = self.kind.options | (loss_options or {})
        self.momentum, self.mask_same, self.keys = momentum, check_mask_same(mask_same), _checked_keys(keys)
        self.encoder_b: nn.Module | None = None
        feature_dim_b = self.feature_dim
        if encoder_b is not None:
            self.encoder_b, feature_dim_b = build_backbone(encoder_b, **(encoder_b_options or {}))
        head = {"hidden_dim": hidden_dim, "out_dim": projection_dim, "norm": head_norm}
        self.projector = _head(self.kind, self.feature_dim, head)
        self.projector_b = None if encoder_b is None else _head(self.kind, feature_dim_b, head)
        dim = self.feature_dim if projection_dim is None else projection_dim
        if projection_dim is None:
            hint = "Set `projection_dim`, or give encoders of one width"
            require(feature_dim_b == dim, "encoder_b", f"have {dim} features, as encoder_a", feature_dim_b, hint)
        self.predictor, self.predictor_b = None, None
        if self.kind.predictor:
            self.predictor = _head(self.kind, dim, head | {"out_dim": dim})
            if encoder_b is not None and symmetric:
                self.predictor_b = _head(self.kind, dim, head | {"out_dim": dim})
        self._add_momentum_networks()
        if self.kind.temperature is not None:
            given = LearnedTemperature(self.kind.temperature) if temperature is None else temperature
            self.temperature = check_temperature(given)
        self.logit_bias = LogitBias(logit_bias, lr=1e-3) if loss == "siglip" else None
        self.bilinear = BilinearWeight(dim) if loss == "bilinear" else None
        self.save_hyperparameters()

    def _check_arguments(
        self, temperature: Any, momentum: float | None, mask_same: Any, encoder_b: Any, encoder_b_options: Any
    ) -> None:
        if momentum is not None:
            check_probability("momentum", momentum)
        name = self.loss
        hint = "BYOL has 0.996 for 1,000 epochs, 0.99 for fewer"
        require(
            momentum is not None or not self.kind.predictor, "momentum", f"be a number for {name!r}", momentum, hint
        )
        has_temperature = temperature is None or self.kind.temperature is not None
        require(has_temperature, "temperature", f"be None for {name!r}, which has none", temperature, "Leave it out")
        masks = mask_same is None or self.kind.groups
        require(masks, "mask_same", f"be None for {name!r}", mask_same, 'Choose "info_nce" or "nt_xent"')
        used = encoder_b_options is None or isinstance(encoder_b, str | nn.Module)
        require(used, "encoder_b_options", "be None without `encoder_b`", encoder_b_options, "Give `encoder_b`")

    def _add_momentum_networks(self) -> None:
        """Copy the networks of items b and, for both directions with two encoders, those of items a."""
        self.momentum_backbone: nn.Module | None = None  # of items a, or of both
        self.momentum_projector: nn.Module | None = None
        self.momentum_encoder_b: nn.Module | None = None
        self.momentum_projector_b: nn.Module | None = None
        if self.momentum is None:
            return
        if self.encoder_b is None or self.symmetric:
            self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
            self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if self.encoder_b is not None and self.projector_b is not None:
            self.momentum_encoder_b = copy.deepcopy(self.encoder_b).requires_grad_(False)
            self.momentum_projector_b = copy.deepcopy(self.projector_b).requires_grad_(False)

    def encode_a(self, items: Any) -> Tensor:
        """Return the embeddings (B, D) of items a (B, ...), unit rows."""
        return unit_rows(self.projector(self.backbone(items)))

    def encode_b(self, items: Any) -> Tensor:
        """Return the embeddings (B, D) of items b (B, ...), unit rows."""
        return unit_rows(self._online_b(items))

    def images(self, batch: Any) -> Any:
        """Return items a of an evaluation batch: of a dict with ``keys`` the first, else the images (B, ...)."""
        if self.keys is not None and isinstance(batch, Mapping) and self.keys[0] in batch:
            return batch[self.keys[0]]
        return super().images(batch)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of the pairs, and the features (B, F) of items a."""
        a, b = self.pair(batch)
        options: dict[str, Any] = dict(self.loss_options)
        if self.kind.temperature is not None:
            temperature = current_temperature(self)
            options[self.kind.scale_name] = temperature if self.kind.scale_name == "temperature" else 1 / temperature
        if self.kind.groups:
            options["groups"] = sample_ids(batch, self.mask_same, "PairContrast")  # (B,)
        if self.logit_bias is not None:
            options["logit_bias"] = self.logit_bias()
        if self.bilinear is not None:
            options["weight"] = self.bilinear()
        features = self.backbone(a)  # (B, F)
        embedding = self.projector(features)  # (B, D)
        if self.momentum is None:
            loss = self.kind.function(embedding, self._online_b(b), **options)
        else:
            loss = self._loss_with_targets(a, b, embedding, options)
        self.log("train/loss", loss, batch_size=len(features))
        return {"loss": loss, "features": features.detach()}

    def _loss_with_targets(self, a: Any, b: Any, embedding: Tensor, options: dict[str, Any]) -> Tensor:
        """Compare online embeddings with those of the momentum networks, in one or both directions."""
        with torch.no_grad():
            target_b = self._momentum_b(b)  # (B, D)
        query = embedding if self.predictor is None else self.predictor(embedding)
        loss = self.kind.function(query, target_b, **options)
        if not self.symmetric:
            return loss
        assert self.momentum_backbone is not None and self.momentum_projector is not None  # noqa: PT018
        with torch.no_grad():
            target_a = self.momentum_projector(self.momentum_backbone(a))  # (B, D)
        predictor = self.predictor if self.predictor_b is None else self.predictor_b
        query = self._online_b(b) if predictor is None else predictor(self._online_b(b))
        return 0.5 * (loss + self.kind.function(query, target_a, **options))

    def _online_b(self, items: Any) -> Tensor:
        encoder, projector = self.encoder_b or self.backbone, self.projector_b or self.projector
        return projector(encoder(items))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def _momentum_b(self, items: Any) -> Tensor:
        encoder = self.momentum_encoder_b or self.momentum_backbone
        projector = self.momentum_projector_b or self.momentum_projector
        assert encoder is not None and projector is not None  # noqa: PT018  # made with `momentum`
        return projector(encoder(items))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def pair(self, batch: Any) -> tuple[Any, Any]:
        """Return the two items of a batch, each with B rows; raise if one is missing or the rows do not match."""
        a, b = _items(batch, self.keys)
        sizes = len(a), len(b)
        hint = "Yield one row of each item per pair, in the same order"
        require(sizes[0] == sizes[1], "batch", "hold as many items a as items b", sizes, hint)
        check_batch("batch", sizes[0], 1 if distributed.is_distributed() else 2)
        return a, b

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return (online, momentum) modules; none without ``momentum``."""
        pairs = [
            (self.backbone, self.momentum_backbone),
            (self.projector, self.momentum_projector),
            (self.encoder_b, self.momentum_encoder_b),
            (self.projector_b, self.momentum_projector_b),
        ]
        kept = [(online, target) for online, target in pairs if online is not None and target is not None]
        return [pair for pair in kept if any(True for _ in pair[0].parameters())]  # without heads: Identity

    def default_callbacks(self) -> list[L.Callback]:
        """Return the EMA callback if there is a momentum network."""
        return [] if self.momentum is None else [MomentumUpdate(self.momentum)]


def _head(kind: PairLoss, in_dim: int, options: dict[str, Any]) -> nn.Module:
    """Return the projection head of a loss; Identity without ``out_dim``."""
    return nn.Identity() if options["out_dim"] is None else build_head(kind.head, in_dim, **options)


def _checked_keys(keys: tuple[str, str] | None) -> tuple[str, str] | None:
    if keys is None:
        return None
    ok = isinstance(keys, list | tuple) and len(keys) == 2 and keys[0] != keys[1]
    require(ok, "keys", "be two different keys of the batch", keys, 'For example ("image", "depth")')
    return keys[0], keys[1]


def _items(batch: Any, keys: tuple[str, str] | None) -> tuple[Any, Any]:
    if keys is not None:
        if not isinstance(batch, Mapping):
            hint = "Yield a dict from the loader, or leave `keys` out"
            fail("batch", f"be a dict with {keys[0]!r} and {keys[1]!r}", type(batch).__name__, hint, TypeError)
        missing = [key for key in keys if batch.get(key) is None]
        hint = "PairContrast needs both items in each batch; filter the incomplete pairs in the dataset"
        require(not missing, "batch", f"hold {keys[0]!r} and {keys[1]!r}", f"no {', '.join(map(repr, missing))}", hint)
        return batch[keys[0]], batch[keys[1]]
    views: Any = batch
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], list | tuple):
        views = batch[0]  # ([a, b], labels, ...)
    elif not isinstance(batch, list | tuple):
        views, _ = split_batch(batch)
    is_pair = isinstance(views, list | tuple) and len(views) == 2
    is_pair = is_pair and all(isinstance(item, Tensor) and item.ndim > 1 for item in views)
    is_pair = is_pair and all(item.is_floating_point() for item in views)
    if not is_pair:
        got = [str(getattr(item, "dtype", type(item).__name__)) for item in views] if len(views) < 9 else len(views)
        hint = "Yield (a, b), ([a, b], labels), or a dict and name `keys`; `data.GroupPairs` makes pairs by label"
        fail("batch", "hold two items as floating tensors", got, hint)
    return views[0], views[1]
