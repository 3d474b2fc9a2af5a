"""CLIP's and SigLIP's losses equal the reference programs, on one rank and on two, with teacher and duplicates."""

import json
from pathlib import Path

import pytest
import torch

from lightning_contrast import losses
from tests.launch import run_processes
from tests.tolerances import CANCELLING, NETWORK, f64, near

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parents[1] / "official_image_text.json").read_text(encoding="utf-8"))
}


def clip(image, text, log_scale=None, **params):
    return losses.clip_loss(image, text, **(params or {"logit_scale": log_scale.exp()}))


def siglip(image, text, log_scale, bias):
    return losses.siglip_loss(image, text, logit_scale=log_scale.exp(), logit_bias=bias)


def distilled(image, text, teacher_image, teacher_text, logit_scale, teacher_logit_scale):
    scales = {"logit_scale": logit_scale, "teacher_logit_scale": teacher_logit_scale}
    teacher = losses.clip_distillation_loss(image, text, teacher_image, teacher_text, **scales)
    return losses.clip_loss(image, text, logit_scale=logit_scale) + teacher


CALLS = {"clip_learned_scale": clip, "clip_bias": clip, "clip_distill": distilled, "siglip_learned": siglip}
RANKS = {name: siglip if name.startswith("siglip") else clip for name in RECORDS if "two_ranks" in name}


def leaves(record):
    inputs = {key: torch.tensor(value) for key, value in record["inputs"].items()}
    return {key: value.requires_grad_(key in record["grad_norm"]) for key, value in inputs.items()}


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_reference_implementation(name):
    record = RECORDS[name]
    inputs = leaves(record)
    loss = CALLS[name](**inputs, **record["params"])
    loss.backward()
    assert float(loss.detach()) == near(record["loss"])
    for key, norm in record["grad_norm"].items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


def test_every_official_record_is_used():
    assert {*CALLS, *RANKS} == set(RECORDS)
    assert len(RANKS) == 3


def rank_step(rank, name):
    """Return the loss and the gradients, of scale and bias as DDP averages them, of features as if all shared them."""
    inputs = leaves(RECORDS[name])
    rows = slice(rank * 3, rank * 3 + 3)
    pairs = {key: value[rows] for key, value in inputs.items() if value.ndim}
    loss = RANKS[name](**(inputs | pairs))
    loss.backward()
    for value in inputs.values():
        torch.distributed.all_reduce(value.grad)
        value.grad /= 2
    return float(loss.detach()), {key: float(value.grad.norm()) for key, value in inputs.items()}


@pytest.mark.dist
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_equal_the_reference_implementation(name):
    for loss, norms in run_processes(rank_step, 2, name):
        assert loss == near(RECORDS[name]["loss"])
        for key, norm in RECORDS[name]["grad_norm"].items():
            assert norms[key] == near(norm, NETWORK), key


def draw(rows=6):
    generator = torch.Generator().manual_seed(4)
    image, text, teacher_image, teacher_text = torch.randn(4, rows, 5, generator=generator, dtype=torch.float64)
    scale, bias = torch.tensor([2.0, -1.0], dtype=torch.float64).unbind()
    return [image, text, scale, bias, teacher_image, teacher_text]


GROUPS = torch.tensor([0, 1, 0, -1, -1, 1])


def masked(image, text, scale, bias, groups):
    return losses.siglip_loss(image, text, logit_scale=scale, logit_bias=bias, groups=groups)


@pytest.mark.parametrize("tile_size", [None, 2])
def test_siglip_leaves_out_pairs_of_one_group(tile_size):
    image, text, scale, bias, *_ = [value.requires_grad_() for value in draw()]
    loss = losses.siglip_loss(image, text, logit_scale=scale, logit_bias=bias, groups=GROUPS, tile_size=tile_size)
    logits = scale * torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T + bias
    expected = 0.0
    for i in range(6):
        for j in range(6):
            if i == j or GROUPS[i] < 0 or GROUPS[i] != GROUPS[j]:
                expected = expected - torch.nn.functional.logsigmoid(logits[i, j] if i == j else -logits[i, j]) / 6
    torch.testing.assert_close(loss, expected, **f64(CANCELLING))
    leaf = (image, text, scale, bias)
    pairs = zip(torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, leaf), strict=True)
    for found, exact in pairs:
        torch.testing.assert_close(found, exact, **f64(CANCELLING))


def unequal_ranks(rank, kind):
    rows = slice(0, 4) if rank == 0 else slice(4, 6)
    image, text, scale, bias, teacher_image, teacher_text = (value.requires_grad_() for value in draw())
    if kind == "siglip":
        loss = masked(image[rows], text[rows], scale, bias, GROUPS[rows])
    elif kind == "clip":
        loss = losses.clip_loss(image[rows], text[rows], logit_scale=scale, logit_bias=bias, groups=GROUPS[rows])
    else:
        teacher = teacher_image[rows], teacher_text[rows]
        loss = losses.clip_distillation_loss(
            image[rows], text[rows], *teacher, logit_scale=scale, teacher_logit_scale=3.0
        )
        loss = loss + 0.0 * bias
    loss.backward()
    gradients = [image.grad, text.grad, scale.grad, bias.grad]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= 2
    return loss.detach(), gradients


def alone(kind):
    image, text, scale, bias, teacher_image, teacher_text = (value.requires_grad_() for value in draw())
    if kind == "siglip":
        loss = masked(image, text, scale, bias, GROUPS)
    elif kind == "clip":
        loss = losses.clip_loss(image, text, logit_scale=scale, logit_bias=bias, groups=GROUPS)
    else:
        loss = 0.0 * bias + losses.clip_distillation_loss(
            image, text, teacher_image, teacher_text, logit_scale=scale, teacher_logit_scale=3.0
        )
    loss.backward()
    return loss.detach(), [image.grad, text.grad, scale.grad, bias.grad]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["clip", "siglip", "distillation"])
def test_two_unequal_ranks_equal_one(kind):
    loss, gradients = alone(kind)
    for found, of_rank in run_processes(unequal_ranks, 2, kind):
        torch.testing.assert_close(found, loss, **f64(CANCELLING))
        for a, b in zip(of_rank, gradients, strict=True):
            torch.testing.assert_close(a, b, **f64(CANCELLING))


def test_a_teacher_of_another_batch_is_refused():
    image, text, _, _, teacher_image, teacher_text = draw()
    with pytest.raises(ValueError, match=r"`teacher_image` must have 6 rows, got 5"):
        losses.clip_distillation_loss(
            image, text, teacher_image[:5], teacher_text[:5], logit_scale=10.0, teacher_logit_scale=10.0
        )
