"""Losses of masked prediction: values of the reference implementations, formulas in loops, ranks, bad inputs."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_contrast import distributed, losses, nn
from tests.launch import run_processes
from tests.tolerances import CANCELLING, FORMULA, NETWORK, f32, f64, near

RECORDS = {
    record["name"]: record
    for record in json.loads((Path(__file__).parent / "official_masked.json").read_text(encoding="utf-8"))
}


def _data2vec(layers, mask, prediction, beta, layers_used, **norms) -> Tensor:
    targets = losses.average_layers(layers[layers_used], **norms)
    return losses.data2vec_loss(prediction, targets[mask > 0], beta=beta)


def _vjepa(target_tokens, index_short, index_long, prediction_short, prediction_long, exponent) -> Tensor:
    indices = [index_short.long(), index_long.long()]
    return losses.vjepa_loss([prediction_short, prediction_long], target_tokens, indices, exponent=exponent)


CALLS = {
    "mae": losses.masked_pixel_loss,
    "mae_raw": losses.masked_pixel_loss,
    "mae_patchify": losses.patchify,
    "positions_2d": lambda dim, grid_size: nn.sincos_positions_2d(dim, grid_size, class_token=True),
    "positions_3d": nn.sincos_positions_3d,
    "simmim": losses.masked_l1_loss,
    "data2vec2_targets": losses.average_layers,
    "data2vec2": lambda **x: losses.data2vec_loss(**x, reduction="scaled_sum"),
    "data2vec": _data2vec,
    "ijepa": lambda prediction, target_tokens, target_index: losses.jepa_loss(
        prediction, target_tokens, target_index.long()
    ),
    "vjepa": _vjepa,
}


@pytest.mark.parametrize("name", RECORDS)
def test_equals_the_reference_implementation(name: str) -> None:
    record = RECORDS[name]
    norms = record.get("grad_norm", {})
    inputs = {key: torch.tensor(value).requires_grad_(key in norms) for key, value in record["inputs"].items()}
    value = CALLS[name](**inputs, **record["params"])
    if "value" in record:
        torch.testing.assert_close(value, torch.tensor(record["value"]), **f32(FORMULA))
        return
    value.backward()
    assert float(value.detach()) == near(record["loss"])
    for key, norm in norms.items():
        assert float(inputs[key].grad.norm()) == near(norm, NETWORK), key


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_patches_of_an_oblong_image_come_back() -> None:
    images = _random(2, 3, 4, 8)
    patches = losses.patchify(images, patch_size=2)
    assert torch.equal(patches[1, 5], images[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())
    assert torch.equal(losses.unpatchify(patches, (2, 4), patch_size=2), images)


def test_pixels_of_visible_patches_do_not_count() -> None:
    images, prediction = _random(2, 3, 4, 6), _random(2, 6, 12, seed=1)
    mask = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]])
    patches, total = losses.patchify(images, patch_size=2), 0.0
    for b, n in ((0, 0), (0, 5), (1, 2)):
        x = patches[b, n]
        x = (x - x.mean()) / (x.var() + 1e-6).sqrt()
        total += float((prediction[b, n] - x).square().mean()) / 3
    options = {"patch_size": 2, "normalize_pixels": True}
    assert float(losses.masked_pixel_loss(images, prediction, mask, **options)) == near(total)
    changed = torch.where(mask[..., None] > 0, prediction, 0.0)
    assert float(losses.masked_pixel_loss(images, changed, mask > 0, **options)) == near(total)


def test_l1_of_an_oblong_image_is_the_mean_over_masked_pixels() -> None:
    images, other = _random(2, 3, 4, 6), _random(2, 3, 4, 6, seed=1)
    mask = torch.tensor([[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 0]]])
    pixels = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand(-1, 3, -1, -1) > 0
    expected = float((images - other)[pixels].abs().mean())
    assert float(losses.masked_l1_loss(images, other, mask, patch_size=2)) == near(expected)


def test_squared_jepa_loss_and_kinds_of_vjepa() -> None:
    tokens, index = _random(2, 5, 4), torch.tensor([[[0, 2], [4, 1]]])
    target = torch.nn.functional.layer_norm(tokens, (4,))[torch.arange(2)[:, None], index[0]]
    prediction = _random(2, 2, 4, seed=1)
    expected = float((prediction - target).square().mean())
    assert float(losses.jepa_loss(prediction, tokens, index, kind="l2")) == near(expected)
    two = losses.vjepa_loss([prediction, target[:, :1]], tokens, [index[0], index[0, :, :1]], exponent=2.0)
    assert float(two) == near(expected / 4)  # half of it per kind, and nothing for the second


LAYERS, ROWS = _random(3, 8, 4, 6), [5, 3]
IMAGES, MASK = _random(8, 3, 4, 4), _random(8, 4, seed=2) > 0.4  # other numbers of masked patches on each rank
INDEX = torch.arange(24).remainder(4).view(3, 8, 1)
RANKED = {
    "mae": lambda x, rows: losses.masked_pixel_loss(
        IMAGES[rows], x[rows].repeat(1, 1, 2), MASK[rows], patch_size=2, normalize_pixels=True
    ),
    "simmim": lambda x, rows: losses.masked_l1_loss(
        IMAGES[rows], x[rows].view(-1, 1, 4, 6)[..., :4].expand(-1, 3, -1, -1), MASK[rows].view(-1, 2, 2), patch_size=2
    ),
    "data2vec": lambda x, rows: losses.data2vec_loss(
        x[rows][MASK[rows]], losses.average_layers(LAYERS[:, rows])[MASK[rows]], beta=1.0
    ),
    "ijepa": lambda x, rows: losses.jepa_loss(
        x[rows, :3].transpose(0, 1).flatten(0, 1).unsqueeze(1), LAYERS[0, rows], INDEX[:, rows]
    ),
    "vjepa": lambda x, rows: losses.vjepa_loss(
        [x[rows, :1], x[rows, :2]], LAYERS[0, rows], [INDEX[0, rows], INDEX[:2, rows].squeeze(2).T]
    ),
}


def _ranked(rank: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    start = sum(ROWS[:rank])
    rows = slice(start, start + ROWS[rank]) if distributed.is_distributed() else slice(None)
    values, grads = {}, {}
    for name, loss in RANKED.items():
        x = _random(8, 4, 6, seed=3).requires_grad_()
        value = loss(x, rows)
        value.backward()
        values[name], grads[name] = value.detach(), x.grad
    return torch.tensor(rank), values, grads


@pytest.mark.dist
def test_two_ranks_equal_one() -> None:
    _, alone, gradient = _ranked(0)
    ranks = run_processes(_ranked, 2)
    for name, value in alone.items():
        for _, values, _ in ranks:
            torch.testing.assert_close(values[name], value, **f64(CANCELLING))
        total = sum(grads[name] for _, _, grads in ranks) / 2
        torch.testing.assert_close(total, gradient[name], **f64(CANCELLING))


X, P4 = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 12)
ERRORS = {
    "edges": (lambda: losses.patchify(torch.zeros(1, 3, 5, 4), patch_size=2), "`images` must have shape .* of 2"),
    "grid": (lambda: losses.unpatchify(P4, (2, 3), patch_size=2), r"`patches` must have shape \(B, 6, 4 C\)"),
    "prediction": (
        lambda: losses.masked_pixel_loss(X, P4[:, :3], torch.ones(2, 3), patch_size=2, normalize_pixels=True),
        r"`prediction` must have shape \(2, 4, 12\)",
    ),
    "mask": (
        lambda: losses.masked_pixel_loss(X, P4, torch.ones(2, 3), patch_size=2, normalize_pixels=True),
        r"`mask` must have shape \(2, 4\)",
    ),
    "nothing masked": (
        lambda: losses.masked_pixel_loss(X, P4, torch.zeros(2, 4), patch_size=2, normalize_pixels=True),
        "`mask` must mask at least one patch",
    ),
    "reconstruction": (
        lambda: losses.masked_l1_loss(X, X[:1], torch.ones(2, 2, 2), patch_size=2),
        "`reconstruction` must have the shape",
    ),
    "flat mask": (
        lambda: losses.masked_l1_loss(X, X, torch.ones(2, 4), patch_size=2),
        r"`mask` must have shape \(2, 2, 2\)",
    ),
    "layers": (lambda: losses.average_layers(torch.zeros(2, 1, 3, 4), top_k=3), "`top_k` must be at most the 2"),
    "no layers": (lambda: losses.average_layers([]), "`layers` must hold at least one"),
    "unlike layers": (
        lambda: losses.average_layers([torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)]),
        "`layers` must have one shape",
    ),
    "beta": (lambda: losses.data2vec_loss(X[0, 0], X[0, 0], beta=-1.0), "`beta` must be >= 0"),
    "reduction": (lambda: losses.data2vec_loss(X[0, 0], X[0, 0], beta=1.0, reduction="sum"), "`reduction` must be one"),
    "no rows": (
        lambda: losses.data2vec_loss(X[0, 0, :0], X[0, 0, :0], beta=1.0),
        "`prediction` must have at least one row",
    ),
    "rows": (lambda: losses.data2vec_loss(X[0, 0], X[0, 0, :2], beta=1.0), "`prediction` must have the target's"),
    "kind": (lambda: losses.jepa_loss(P4, P4, torch.zeros(1, 2, 4).long(), kind="l1"), "`kind` must be one of"),
    "blocks": (lambda: losses.jepa_loss(P4, P4, torch.zeros(2, 4).long()), "`target_index` must have shape"),
    "index": (lambda: losses.jepa_loss(P4, P4, torch.zeros(1, 3, 4).long()), "`index` must be"),
    "kinds": (lambda: losses.vjepa_loss([P4], P4, []), "`predictions` must be as many"),
    "exponent": (lambda: losses.vjepa_loss([P4], P4, [torch.zeros(2, 4).long()], exponent=0), "`exponent` must be"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
