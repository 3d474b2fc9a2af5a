"""The losses of two aligned embeddings by name, and what each needs around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_contrast._checks import check_choice, check_dict, check_not_negative, check_probability, require
from lightning_contrast.losses.bilinear import bilinear_loss
from lightning_contrast.losses.contrastive import nt_xent
from lightning_contrast.losses.geometric import spectral_contrastive_loss
from lightning_contrast.losses.image_text import clip_loss, siglip_loss
from lightning_contrast.losses.predictive import byol_loss
from lightning_contrast.losses.redundancy import barlow_twins_loss, vicreg_loss
from lightning_contrast.precision import upcast


@dataclass(frozen=True)
class PairLoss:
    """A loss of two embeddings ``(B, D)`` and what it needs around it.

    Attributes:
        function: ``function(z_a, z_b, **arguments)`` returns a scalar.
        head: Projection head of `nn.build_head`.
        weights: Numbers that the function takes, and their defaults.
        temperature: Start of the learned temperature; None: the loss has no temperature.
        scale: How the function takes it: "temperature", or "logit_scale", its inverse.
        logit_bias: Start of the learned bias of the logits; None: the loss has no bias.
        bilinear: Whether the function takes a learned matrix ``weight``, (D, D).
        predictor: Whether online embeddings pass a predictor, to be compared with those of a momentum network.
        groups: Whether the function takes groups of false negatives, ``groups`` (B,).
    """

    function: Callable[..., Tensor]
    head: str = "simclr"
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float | None = None
    scale: str = "logit_scale"
    logit_bias: float | None = None
    bilinear: bool = False
    predictor: bool = False
    groups: bool = False

    def scaled(self, temperature: float | Tensor) -> dict[str, float | Tensor]:
        """Return the argument that holds a temperature, a number or a tensor (1,)."""
        temperature = upcast(temperature)  # the module's parameters may be in half precision
        return {self.scale: temperature if self.scale == "temperature" else 1 / temperature}


PAIR_LOSSES = {
    "info_nce": PairLoss(clip_loss, temperature=0.07, groups=True),
    "nt_xent": PairLoss(nt_xent, temperature=0.1, scale="temperature", groups=True),
    "siglip": PairLoss(siglip_loss, temperature=0.1, logit_bias=-10.0, groups=True),
    "barlow_twins": PairLoss(barlow_twins_loss, "barlow_twins", {"off_diagonal_weight": 0.0051}),
    "vicreg": PairLoss(
        vicreg_loss, "vicreg", {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0}
    ),
    "spectral": PairLoss(spectral_contrastive_loss, "spectral", {"mu": 1.0}),
    "byol": PairLoss(byol_loss, "byol", predictor=True),
    "bilinear": PairLoss(bilinear_loss, bilinear=True),
}
"""The losses by name: "info_nce" is CLIP's in both directions, "bilinear" CURL's; each function has its source."""


def pair_loss(
    name: str, weights: Mapping[str, float] | None, temperature: Any, momentum: float | None, mask_same: str | None
) -> tuple[PairLoss, dict[str, float]]:
    """Return a loss by name and its weights, after checking that the other arguments of a method belong to it.

    Args:
        name: A key of `PAIR_LOSSES`.
        weights: Numbers that replace defaults of the loss.
        temperature: A temperature, or None.
        momentum: An EMA momentum in [0, 1], or None.
        mask_same: Which samples are not negatives, or None.

    Raises:
        ValueError: If a name is unknown, a number out of range, or an argument does not belong to the loss.
        TypeError: If the weights are not a dict of numbers.
    """
    check_choice("loss", name, PAIR_LOSSES)
    kind = PAIR_LOSSES[name]
    given = check_dict("loss_options", weights, 'Give {"covariance_weight": 4.0}')
    for key, weight in given.items():
        check_choice("loss_options", key, kind.weights)
        check_not_negative(f"loss_options.{key}", weight)
    if momentum is not None:
        check_probability("momentum", momentum)
    hint = "BYOL has 0.996 for 1,000 epochs, 0.99 for fewer"
    require(momentum is not None or not kind.predictor, "momentum", f"be a number for {name!r}", momentum, hint)
    fits = temperature is None or kind.temperature is not None
    require(fits, "temperature", f"be None for {name!r}, which has none", temperature, "Leave it out")
    hint = f"Choose one of {', '.join(repr(key) for key, loss in PAIR_LOSSES.items() if loss.groups)}"
    require(mask_same is None or kind.groups, "mask_same", f"be None for {name!r}", mask_same, hint)
    return kind, kind.weights | given
