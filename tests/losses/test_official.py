"""The values that the authors' own programs give, and the known answers of the formulas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_contrast import losses

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parents[1] / "official_losses.json").read_text(encoding="utf-8"))
}

# Each takes the inputs and the parameters of its record.
PROGRAMS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Tensor]] = {
    "nt_xent_sum_of_halves": lambda x, p: 2 * losses.nt_xent(**x, **p),
    "moco": lambda x, p: losses.info_nce(**x, **p),
    "moco_v3": lambda x, p: losses.moco_v3_loss(**x, **p),
    "byol": lambda x, p: losses.byol_loss(**x),
    "simsiam": lambda x, p: (
        (losses.negative_cosine(x["p1"], x["z2"]) + losses.negative_cosine(x["p2"], x["z1"])) / 2
    ),
    "clip": lambda x, p: losses.clip_loss(**x, **p),
    "siglip": lambda x, p: losses.siglip_loss(**x, **p),
    "spectral_contrastive": lambda x, p: losses.spectral_contrastive_loss(**x, **p),
    "debiased": lambda x, p: losses.debiased_nt_xent(**x, **p),
    "hard_negative": lambda x, p: losses.hard_negative_nt_xent(**x, **p),
    "decoupled": lambda x, p: losses.decoupled_nt_xent(**x, **p),
    "supcon": lambda x, p: losses.sup_con(**x, **p, labels=torch.arange(8) % 3),
    "alignment": lambda x, p: losses.alignment(**x),
    "uniformity": lambda x, p: losses.uniformity(**x),
    "triplet": lambda x, p: losses.triplet_loss(**x, **p),
}


def _leaves(values: Any, names: set[str], name: str) -> Any:
    return torch.tensor(values).requires_grad_(name in names)


@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_the_authors_program(name: str) -> None:
    record = RECORDS[name]
    names = set(record["grad_norm"])
    inputs = {key: _leaves(value, names, key) for key, value in record["inputs"].items()}
    loss = PROGRAMS[name](inputs, record["params"])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(record["loss"], rel=1e-5)
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == pytest.approx(norm, rel=1e-4), key


def _waves() -> dict[str, Tensor]:
    """Return the inputs of the known answers: 6 x 8 waves, raw and normalised, and a queue of 16."""
    i, j, k = (torch.arange(n, dtype=torch.float64) for n in (6, 8, 16))
    phase = 0.7 * i[:, None] + 1.3 * j + 0.1 * i[:, None] * j
    x, y = phase.sin(), (phase + 0.3 * (1 + 0.2 * i[:, None])).sin()
    normalize = torch.nn.functional.normalize
    queue = normalize((0.3 * k[:, None] + 1.1 * j).cos(), dim=1)
    return {"x": x, "y": y, "zx": normalize(x, dim=1), "zy": normalize(y, dim=1), "queue": queue}


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
}


@pytest.mark.parametrize("name", ANSWERS)
def test_known_answer(name: str) -> None:
    call, answer = ANSWERS[name]
    assert float(call()) == pytest.approx(answer, abs=2e-8)
