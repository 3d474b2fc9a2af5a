"""Values of the reference implementations, and known values of the formulas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_contrast import losses
from tests.tolerances import NETWORK, decimals, f32, near

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parents[1] / "official_losses.json").read_text(encoding="utf-8"))
}

# Each takes the inputs and the parameters of its record.
REFERENCES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Tensor]] = {
    "nt_xent_sum_of_halves": lambda x, p: 2 * losses.nt_xent(**x, **p),
    "moco": lambda x, p: losses.info_nce(**x, **p),
    "moco_v3": lambda x, p: losses.moco_v3_loss(**x, **p),
    "byol": lambda x, p: losses.byol_loss(**x),
    "simsiam": lambda x, p: (losses.negative_cosine(x["p1"], x["z2"]) + losses.negative_cosine(x["p2"], x["z1"])) / 2,
    "clip": lambda x, p: losses.clip_loss(**x, **p),
    "siglip": lambda x, p: losses.siglip_loss(**x, **p),
    "spectral_contrastive": lambda x, p: losses.spectral_contrastive_loss(**x, **p),
    "debiased": lambda x, p: losses.debiased_nt_xent(**x, **p),
    "hard_negative": lambda x, p: losses.hard_negative_nt_xent(**x, **p),
    "decoupled": lambda x, p: losses.decoupled_nt_xent(**x, **p),
    "supcon": lambda x, p: losses.sup_con(x["z_a"], x["z_b"], torch.arange(8) % 3, **p),
    "alignment": lambda x, p: losses.alignment(**x),
    "uniformity": lambda x, p: losses.uniformity(**x),
    "triplet": lambda x, p: losses.triplet_loss(**x, **p),
    "barlow_twins": lambda x, p: losses.barlow_twins_loss(**x, off_diagonal_weight=p["lambd"]),
    "vicreg": lambda x, p: losses.vicreg_loss(**x, **{f"{key}_weight": value for key, value in p.items()}),
    "dino": lambda x, p: losses.dino_loss(**x, **p),
    "ibot_patch": lambda x, p: losses.ibot_patch_loss(**x, **p),
    "swav": lambda x, p: losses.swav_loss(**x, **p),
    "msn": lambda x, p: losses.msn_loss(**x, **p),
    "msn_sinkhorn": lambda x, p: losses.msn_loss(**x, **p),
    "koleo": lambda x, p: losses.koleo_loss(**x),
}
LISTS = {("dino", "student"), ("dino", "teacher"), ("swav", "scores")}


def _leaves(values: Any, record: dict[str, Any], key: str) -> Any:
    with_gradient = key in record["grad_norm"]
    if (record["name"], key) in LISTS:
        return [torch.tensor(value).requires_grad_(with_gradient) for value in values]
    return torch.tensor(values).requires_grad_(with_gradient)


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_reference_implementation(name: str) -> None:
    record = RECORDS[name]
    inputs = {key: _leaves(value, record, key) for key, value in record["inputs"].items()}
    loss = REFERENCES[name](inputs, record["params"])
    loss.backward()
    assert float(loss.detach()) == near(record["loss"])
    for key, norm in record["grad_norm"].items():
        leaves, norms = (inputs[key], norm) if isinstance(norm, list) else ([inputs[key]], [norm])
        assert [float(leaf.grad.norm()) for leaf in leaves] == near(norms, NETWORK), key


def test_every_official_record_is_used() -> None:
    assert set(REFERENCES) | set(ASSIGNMENTS) == set(RECORDS)


ASSIGNMENTS = {"sinkhorn": ("scores", "epsilon"), "dinov2_sinkhorn_teacher": ("teacher", "teacher_temperature")}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_sinkhorn_equals_the_reference_implementation(name: str) -> None:
    record, (scores, epsilon) = RECORDS[name], ASSIGNMENTS[name]
    params = record["params"]
    found = losses.sinkhorn(
        torch.tensor(record["inputs"][scores]), epsilon=params[epsilon], iterations=params["iterations"]
    )
    torch.testing.assert_close(
        found, torch.tensor(record["value"]), **f32(NETWORK, size=0.02)
    )  # kept with six decimals


def _waves() -> dict[str, Tensor]:
    """Return the inputs of the known answers: 6 x 8 waves, raw and normalized, and a queue of 16."""
    i, j, k = (torch.arange(n, dtype=torch.float64) for n in (6, 8, 16))
    phase = 0.7 * i[:, None] + 1.3 * j + 0.1 * i[:, None] * j
    x, y = phase.sin(), (phase + 0.3 * (1 + 0.2 * i[:, None])).sin()
    normalize = torch.nn.functional.normalize
    queue = normalize((0.3 * k[:, None] + 1.1 * j).cos(), dim=1)
    k = torch.arange(5, dtype=torch.float64)
    prototypes = normalize((0.9 * k[:, None] + 0.4 * j + 0.05 * k[:, None] * j).sin(), dim=1)
    units = {"zx": normalize(x, dim=1), "zy": normalize(y, dim=1)}
    return {"x": x, "y": y, **units, "queue": queue, "prototypes": prototypes}


W = _waves()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ANSWERS: dict[str, tuple[Callable[[], Tensor], float]] = {
    "nt_xent .1": (lambda: losses.nt_xent(W["x"], W["y"], temperature=0.1), 0.30656615),
    "nt_xent .5": (lambda: losses.nt_xent(W["x"], W["y"], temperature=0.5), 1.14465973),
    "moco_v3 .2": (lambda: losses.moco_v3_loss(W["x"], W["y"], W["x"], W["y"], temperature=0.2), 0.33863575),
    "moco_v3 1": (lambda: losses.moco_v3_loss(W["x"], W["y"], W["x"], W["y"], temperature=1.0), 4.51040279),
    "clip": (lambda: losses.clip_loss(W["x"], W["y"], logit_scale=1 / 0.07), 0.23742499),
    "siglip": (lambda: losses.siglip_loss(W["x"], W["y"], logit_scale=10.0, logit_bias=-10.0), 1.48718556),
    "moco queue": (lambda: losses.info_nce(W["x"], W["y"], W["queue"], temperature=0.2), 0.57129879),
    "dcl": (lambda: losses.decoupled_nt_xent(W["x"], W["y"], temperature=0.1), -1.54444488),
    "dclw": (lambda: losses.decoupled_nt_xent(W["x"], W["y"], temperature=0.1, sigma=0.5), -1.49690712),
    "debiased": (lambda: losses.debiased_nt_xent(W["x"], W["y"], temperature=0.5, tau_plus=0.1), 0.81526425),
    "debiased 0": (lambda: losses.debiased_nt_xent(W["x"], W["y"], temperature=0.5, tau_plus=0.0), 1.14465973),
    "hard 1": (
        lambda: losses.hard_negative_nt_xent(W["x"], W["y"], temperature=0.5, tau_plus=0.1, beta=1.0),
        1.54113657,
    ),
    "hard 2": (
        lambda: losses.hard_negative_nt_xent(W["x"], W["y"], temperature=0.5, tau_plus=0.1, beta=2.0),
        1.81581896,
    ),
    "sup_con": (
        lambda: losses.sup_con(W["x"], W["y"], LABELS, temperature=0.1, base_temperature=0.07),
        15.69417328,
    ),
    "sup_con without labels": (
        lambda: losses.sup_con(W["x"], W["y"], torch.arange(6), temperature=0.1, base_temperature=0.07),
        0.43795165,
    ),
    "sup_con .5": (
        lambda: losses.sup_con(W["x"], W["y"], torch.arange(6), temperature=0.5, base_temperature=0.07),
        8.17614094,
    ),
    "curl": (lambda: losses.bilinear_loss(W["x"], W["y"], torch.eye(8, dtype=torch.float64)), 0.50173842),
    "spectral 1": (lambda: losses.spectral_contrastive_loss(W["x"], W["y"], mu=1.0), -1.49049897),
    "spectral 10": (lambda: losses.spectral_contrastive_loss(W["x"], W["y"], mu=10.0), -0.24238231),
    "alignment": (lambda: losses.alignment(W["x"], W["y"]), 0.21476001),
    "uniformity": (lambda: (losses.uniformity(W["x"]) + losses.uniformity(W["y"])) / 2, -3.13034999),
    "byol": (lambda: losses.byol_loss(W["x"], W["y"]), 0.21476001),
    "simsiam": (lambda: losses.negative_cosine(W["x"], W["y"]), -0.89261999),
    "triplet": (lambda: losses.triplet_loss(W["x"], W["y"], W["x"].roll(1, 0), margin=0.2), 0.0),
    "margin": (
        lambda: losses.margin_contrastive_loss(
            W["zx"].repeat(2, 1), torch.cat([W["zy"], W["zy"].roll(1, 0)]), torch.arange(12) < 6, margin=1.0
        ),
        0.07896486,
    ),
    "barlow": (lambda: losses.barlow_twins_loss(W["x"], W["y"], off_diagonal_weight=0.0051), 0.19919510),
    "barlow, diagonal": (lambda: losses.barlow_twins_loss(W["x"], W["y"], off_diagonal_weight=0.0), 0.09442180),
    "vicreg": (lambda: losses.vicreg_loss(W["x"], W["y"]), 10.46825651),
    "vicreg, invariance": (lambda: _vicreg(1, 0, 0), 0.10599090),
    "vicreg, variance": (lambda: _vicreg(0, 1, 0), 0.25349595),
    "vicreg, covariance": (lambda: _vicreg(0, 0, 1), 1.48108540),
    "swav": (
        lambda: losses.swav_loss(_scores("zx", "zy"), temperature=0.1, epsilon=0.05, iterations=3),
        1.05053198,
    ),
    "swav code 0": (lambda: losses.sinkhorn(*_scores("zx"), epsilon=0.05, iterations=3)[0, 0], 0.23138236),
    "swav code 5": (lambda: losses.sinkhorn(*_scores("zx"), epsilon=0.05, iterations=3)[5, 4], 0.22224799),
    "dino": (
        lambda: losses.dino_loss(
            [W["x"], W["y"]], [W["x"], W["y"]], None, student_temperature=0.1, teacher_temperature=0.04
        ),
        1.72333409,
    ),
    "koleo": (lambda: losses.koleo_loss(W["x"]), 0.00417978),
    "msn, cross entropy": (lambda: _msn(0.0), 0.88832019),
    "msn, both": (lambda: _msn(1.0), 0.88832019 + 0.05087572),
    "ijepa": (lambda: losses.ijepa_loss(W["x"], W["y"]), 0.12527063),
}


def _scores(*names: str) -> list[Tensor]:
    return [W[name] @ W["prototypes"].T for name in names]


def _vicreg(invariance: float, variance: float, covariance: float) -> Tensor:
    return losses.vicreg_loss(
        W["x"],
        W["y"],
        invariance_weight=invariance,
        variance_weight=variance,
        covariance_weight=covariance,
    )


def _msn(weight: float) -> Tensor:
    return losses.msn_loss(
        W["x"],
        W["y"],
        W["prototypes"],
        temperature=0.1,
        target_sharpen_temperature=0.25,
        me_max_weight=weight,
        sinkhorn=False,
    )


@pytest.mark.parametrize("name", ANSWERS)
def test_known_answer(name: str) -> None:
    call, answer = ANSWERS[name]
    assert float(call()) == pytest.approx(answer, abs=decimals(8))
