"""Errors of bad input: the message names the argument, the rule, the value and a hint."""

from collections.abc import Callable

import pytest
import torch

from lightning_contrast import losses
from lightning_contrast.losses import Negatives

Z, SHORT, WIDE = torch.randn(4, 3), torch.randn(3, 3), torch.randn(4, 5)
ONE, WHOLE = torch.randn(1, 3), torch.ones(4, 3, dtype=torch.long)
LABELS = torch.arange(4)

VALUE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "shapes": (lambda: losses.nt_xent(Z, SHORT, temperature=0.1), r"`z_a` and `z_b` must have the same 2-D shape"),
    "widths": (lambda: losses.info_nce(Z, WIDE, temperature=0.1), r"`query` and `key` must have the same"),
    "dimensions": (lambda: losses.clip_loss(Z[0], Z[0], logit_scale=1.0), r"`image` and `text` must have"),
    "one pair": (lambda: losses.nt_xent(ONE, ONE, temperature=0.1), r"`z_a` must have a batch of at least 2, got 1"),
    "one image": (lambda: losses.siglip_loss(ONE, ONE, logit_scale=1.0, logit_bias=0.0), r"`image` must have a batch"),
    "temperature 0": (lambda: losses.nt_xent(Z, Z, temperature=0.0), r"`temperature` must be > 0, got 0\.0"),
    "temperature -1": (lambda: losses.info_nce(Z, Z, temperature=-1), r"`temperature` must be > 0, got -1"),
    "temperature nan": (lambda: losses.nt_xent(Z, Z, temperature=float("nan")), r"`temperature` must be > 0, got nan"),
    "two temperatures": (
        lambda: losses.nt_xent(Z, Z, temperature=torch.ones(2)),
        r"`temperature` must have one element, got \(2,\)",
    ),
    "base temperature": (
        lambda: losses.sup_con(Z, Z, LABELS, temperature=0.1, base_temperature=0.0),
        r"`base_temperature` must be > 0",
    ),
    "scale 0": (lambda: losses.clip_loss(Z, Z, logit_scale=0.0), r"`logit_scale` must be > 0, got 0\.0.*exp"),
    "scale -2": (
        lambda: losses.siglip_loss(Z, Z, logit_scale=-2.0, logit_bias=0.0),
        r"`logit_scale` must be > 0, got -2\.0",
    ),
    "tile 0": (lambda: losses.nt_xent(Z, Z, temperature=0.1, tile_size=0), r"`tile_size` must be >= 1, got 0"),
    "queue width": (
        lambda: losses.info_nce(Z, Z, WIDE, temperature=0.1),
        r"`negatives` must have shape \(rows, 3\), got \(4, 5\)",
    ),
    "mask shape": (
        lambda: losses.info_nce(Z, Z, Z, temperature=0.1, negatives_mask=torch.ones(3, dtype=torch.bool)),
        r"`negatives_mask` must have shape \(4,\), got \(3,\)",
    ),
    "mask alone": (
        lambda: losses.info_nce(Z, Z, temperature=0.1, negatives_mask=torch.ones(4, dtype=torch.bool)),
        r"`negatives_mask` must come with `negatives`",
    ),
    "labels shape": (lambda: losses.sup_con(Z, Z, LABELS[:3], temperature=0.1), r"`labels` must have shape \(4,\)"),
    "groups shape": (
        lambda: losses.nt_xent(Z, Z, temperature=0.1, groups=LABELS[:3]),
        r"`groups` must have shape \(4,\), got \(3,\)",
    ),
    "groups alone": (
        lambda: losses.info_nce(Z, Z, Z, temperature=0.1, groups=LABELS),
        r"`negatives_groups` must come with `groups` and `negatives`",
    ),
    "tau_plus": (
        lambda: losses.debiased_nt_xent(Z, Z, temperature=0.5, tau_plus=1.0),
        r"`tau_plus` must lie in \[0, 1\), got 1\.0",
    ),
    "beta": (
        lambda: losses.hard_negative_nt_xent(Z, Z, temperature=0.5, tau_plus=0.1, beta=-1.0),
        r"`beta` must be >= 0, got -1\.0",
    ),
    "sigma": (
        lambda: losses.decoupled_nt_xent(Z, Z, temperature=0.5, sigma=0.0),
        r"`sigma` must be > 0, got 0\.0",
    ),
    "kind": (lambda: Negatives("dibiased"), r"`negatives` must be one of .*Did you mean 'debiased'"),
    "k": (lambda: Negatives("top_k", k=0), r"`k` must be >= 1, got 0"),
    "heat": (lambda: Negatives("heated", heat=1.0), r"`heat` must lie in \[0, 1\), got 1\.0"),
    "alpha": (lambda: losses.alignment(Z, Z, alpha=0.0), r"`alpha` must be > 0"),
    "t": (lambda: losses.uniformity(Z, t=-2.0), r"`t` must be > 0"),
    "uniformity of one": (lambda: losses.uniformity(ONE), r"`z` must have a batch of at least 2"),
    "mu": (lambda: losses.spectral_contrastive_loss(Z, Z, mu=0.0), r"`mu` must be > 0"),
    "triplet margin": (lambda: losses.triplet_loss(Z, Z, Z, margin=0.0), r"`margin` must be > 0"),
    "triplet shapes": (lambda: losses.triplet_loss(Z, Z, SHORT, margin=0.2), r"`anchor` and `negative` must have"),
    "same": (
        lambda: losses.margin_contrastive_loss(Z, Z, LABELS[:2] == 0, margin=1.0),
        r"`same` must have shape \(4,\)",
    ),
    "extra shape": (
        lambda: losses.info_nce(Z, Z, Z, temperature=0.1, extra_negatives=Z),
        r"`extra_negatives` must have shape \(4, S, 3\)",
    ),
    "extra weighting": (
        lambda: losses.info_nce(Z, Z, Z, temperature=0.1, extra_negatives=torch.randn(4, 2, 3), weighting="hard"),
        r"`weighting` must be 'uniform' with `extra_negatives`",
    ),
    "hardest": (lambda: losses.mochi_negatives(Z, Z, hardest=1), r"`hardest` must be >= 2, got 1"),
    "queue of one": (lambda: losses.mochi_negatives(Z, ONE), r"`negatives` must have at least 2 rows, got 1"),
}

TYPE_ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "integers": (lambda: losses.nt_xent(WHOLE, WHOLE, temperature=0.1), r"`z_a` must be a floating point tensor"),
    "integer text": (lambda: losses.clip_loss(Z, WHOLE, logit_scale=1.0), r"`text` must be a floating point tensor"),
    "not a tensor": (lambda: losses.byol_loss([1.0], Z), r"`prediction` must be a tensor, got 'list'"),
    "float tile": (
        lambda: losses.nt_xent(Z, Z, temperature=0.1, tile_size=2.5),
        r"`tile_size` must be an integer or None, got 2\.5",
    ),
    "float labels": (lambda: losses.sup_con(Z, Z, LABELS.float(), temperature=0.1), r"`labels` must be an integer"),
    "integer mask": (
        lambda: losses.info_nce(Z, Z, Z, temperature=0.1, negatives_mask=LABELS),
        r"`negatives_mask` must be a bool tensor",
    ),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_value_error(name: str) -> None:
    call, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_error(name: str) -> None:
    call, message = TYPE_ERRORS[name]
    with pytest.raises(TypeError, match=message):
        call()
