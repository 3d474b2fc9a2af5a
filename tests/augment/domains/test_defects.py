"""Synthetic defects: where they are, their rates and sizes, labels and masks, bad inputs."""

import math

import pytest
import torch

from lightning_contrast.augment.domains import SyntheticDefects, industrial_views
from lightning_contrast.augment.fused import FusedCutPaste, FusedDent, FusedScratch
from lightning_contrast.testing import HostSyncs
from tests.tolerances import FORMULA, NETWORK, f32


def ramps(count, height, width):
    """Images whose two channels are the row and the column in 0..1: every pixel says where it comes from."""
    rows = ((torch.arange(height) + 0.5) / height)[:, None].expand(height, width)
    columns = ((torch.arange(width) + 0.5) / width).expand(height, width)
    return torch.stack([rows, columns]).expand(count, -1, -1, -1).contiguous()


@pytest.mark.parametrize(("height", "width"), [(48, 48), (32, 64)])
def test_a_patch_is_a_box_of_another_place(height, width):
    torch.manual_seed(0)
    images = ramps(400, height, width)
    operation = FusedCutPaste(0.5, jitter=0.0)
    views = operation(images)
    pasted, numbers = operation._params["pasted"], operation._params["numbers"]
    assert pasted.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(views[~pasted], images[~pasted])
    shares, ratios = [], []
    for image, view, drawn in zip(images[pasted], views[pasted], numbers[pasted], strict=True):
        row, column, from_row, from_column, half_h, half_w = drawn[:6].tolist()
        top, left = round(row - half_h), round(column - half_w)
        tall, wide = round(2 * half_h), round(2 * half_w)
        source = image[:, round(from_row - half_h) :][:, :tall, round(from_column - half_w) :][:, :, :wide]
        expected = image.clone()
        expected[:, top : top + tall, left : left + wide] = source
        torch.testing.assert_close(view, expected, atol=1e-3, rtol=0)
        shares.append(tall * wide / (height * width))
        ratios.append(math.log(wide / tall))
    assert 0.015 < min(shares) < 0.03
    assert 0.13 < max(shares) < 0.17
    assert sum(shares) / len(shares) == pytest.approx(0.085, abs=0.01)
    assert sum(ratios) / len(ratios) == pytest.approx(0, abs=0.15)


@pytest.mark.slow
def test_a_scar_is_thin_and_turned():
    torch.manual_seed(0)
    images = ramps(200, 256, 256)
    operation = FusedCutPaste(kind="scar", jitter=0.0)
    changed = (operation(images) - images).abs().amax(1) > 1e-3
    area = changed.sum((1, 2)).float()
    numbers = operation._params["numbers"]
    boxes = 4 * operation._params["numbers"][:, 4] * operation._params["numbers"][:, 5]
    whole = area > 0.5 * boxes  # others reach over the border or lie where they come from
    assert whole.float().mean() > 0.9
    torch.testing.assert_close(area[whole].mean(), boxes[whole].mean(), atol=0, rtol=0.05)
    assert (area - boxes)[whole].abs().max() < 40
    length, width = 2 * numbers[:, 4], 2 * numbers[:, 5]
    assert (length.min(), length.max()) == (10, 25)
    assert (width.min(), width.max()) == (2, 16)
    angle = torch.atan2(numbers[:, 7], numbers[:, 6]).rad2deg()
    assert 40 < angle.abs().max() <= 45
    assert angle.mean().abs() < 6


def test_the_copy_is_jittered():
    torch.manual_seed(0)
    images = torch.full((500, 3, 32, 32), 0.5)
    views = FusedCutPaste(jitter=0.1)(images)
    factor = (views / 0.5).flatten(1)
    extreme = torch.where((factor.amax(1) - 1).abs() > (factor.amin(1) - 1).abs(), factor.amax(1), factor.amin(1))
    assert 0.899 < extreme.min() < 0.91
    assert 1.09 < extreme.max() < 1.101


def test_a_scratch_is_a_line():
    torch.manual_seed(0)
    images = torch.full((300, 3, 64, 64), 0.5)
    operation = FusedScratch(1.0, (0.3, 0.3), (0.02, 0.02), (0.2, 0.4))
    change = (operation(images) - images)[:, 0]
    numbers = operation._params["numbers"]
    strength = change.abs().amax((1, 2))
    inside = ((numbers[:, 0] - 32).abs() < 20) & ((numbers[:, 1] - 32).abs() < 20)
    torch.testing.assert_close(strength[inside], numbers[inside, 6].abs(), atol=0.08, rtol=0)
    assert (numbers[:, 6] > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    covered = (change / numbers[:, 6, None, None]).sum((1, 2))[inside]
    # a line of 19.2 by 1.28 pixels, each of whose pixels has a share
    torch.testing.assert_close(covered, torch.full_like(covered, 19.2 * 1.28), atol=4.0, rtol=0)
    rows, columns = torch.arange(64.0) + 0.5, torch.arange(64.0) + 0.5
    weight = change[inside].abs()
    center = (weight.sum(2) * rows).sum(1) / weight.sum((1, 2)), (weight.sum(1) * columns).sum(1) / weight.sum((1, 2))
    for found, drawn in zip(center, numbers[inside, :2].T, strict=True):
        torch.testing.assert_close(found, drawn, atol=0.5, rtol=0)


def test_a_dent_is_bright_on_one_side_and_dark_on_the_other():
    torch.manual_seed(0)
    images = torch.full((200, 1, 64, 64), 0.5)
    operation = FusedDent(1.0, (0.05, 0.05), (0.3, 0.3))
    change = (operation(images) - images)[:, 0]
    numbers = operation._params["numbers"]
    inside = ((numbers[:, 0] - 32).abs() < 16) & ((numbers[:, 1] - 32).abs() < 16)
    found = change[inside]
    torch.testing.assert_close(found.amax((1, 2)), torch.full((int(inside.sum()),), 0.3), atol=0.02, rtol=0)
    torch.testing.assert_close(found.amin((1, 2)), torch.full((int(inside.sum()),), -0.3), atol=0.02, rtol=0)
    assert found.sum((1, 2)).abs().max() < 0.5


def test_labels_and_masks_say_what_changed():
    torch.manual_seed(0)
    images = torch.rand(600, 3, 48, 40)
    before = images.clone()
    found = SyntheticDefects(("patch", "scratch", "dent"), p=0.75)(images)
    assert torch.equal(images, before)
    changed = (found.images != images).any(1, keepdim=True)
    assert torch.equal(found.masks, changed)
    assert torch.equal(found.kinds > 0, changed.flatten(1).any(1))
    rates = torch.bincount(found.kinds, minlength=4).float() / 600
    torch.testing.assert_close(rates, torch.full((4,), 0.25), atol=0.06, rtol=0)
    share = found.masks.float().mean((1, 2, 3))
    assert share[found.kinds == 2].max() < share[found.kinds == 1].max()
    assert 0 <= found.images.min() <= found.images.max() <= 1


def test_defects_follow_the_seed_and_read_nothing():
    images = torch.randint(0, 256, (16, 1, 32, 32), dtype=torch.uint8)
    defects = SyntheticDefects()
    torch.manual_seed(3)
    first = defects(images)
    torch.manual_seed(3)
    second = defects(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(first.images[first.kinds == 0], images[first.kinds == 0] / 255, **f32(FORMULA))
    with HostSyncs() as syncs:
        made = defects(images.to("meta"))
    assert made.images.is_meta
    assert not syncs.places
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        third = defects(images)
    assert torch.equal(first.images, third.images)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.slow
def test_parts_have_defects_and_occlusion_on_request_only(fused):
    torch.manual_seed(0)
    images = torch.full((300, 3, 32, 32), 0.5)
    options = {"fused": fused, "light": 0.0, "crop": (1.0, 1.0)}
    plain = industrial_views(32, **options)(images)[0]
    assert plain.flatten(2).std(2).max() < 1e-3
    for name in ("scratches", "dents", "occlusion"):
        view = industrial_views(32, **options, **{name: 0.5})(images)[0]
        uneven = view.flatten(2).std(2).amax(1) > 2e-3
        assert uneven.float().mean().item() == pytest.approx(0.5, abs=0.12)
    lit = industrial_views(32, fused=fused, crop=(1.0, 1.0))(images)[0]
    assert (lit.flatten(2).std(2).amax(1) > 2e-3).float().mean().item() == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SyntheticDefects(()), "`kinds` must be different names"),
        (lambda: SyntheticDefects("patch"), "`kinds` must be different names"),
        (lambda: SyntheticDefects(("patch", "patch")), "`kinds` must be different names"),
        (lambda: SyntheticDefects(("rust",)), "`kinds` must be one of"),
        (lambda: SyntheticDefects(p=2), r"`p` must lie in \[0, 1\]"),
        (lambda: SyntheticDefects()(torch.rand(3, 8, 8)), "`images`"),
        (lambda: FusedCutPaste(kind="hole"), "`kind` must be one of"),
        (lambda: FusedCutPaste(jitter=2), r"`jitter` must lie in \[0, 1\]"),
        (lambda: FusedScratch(length=(0.0, 0.5)), "`length` must start above 0"),
        (lambda: FusedScratch(contrast=(0.5, 2.0)), "`contrast` must be an ordered pair"),
        (lambda: FusedDent(radius=(0.0, 0.1)), "`radius` must be an ordered pair"),
        (lambda: industrial_views(32, scratches=2.0), r"`scratches` must lie in \[0, 1\]"),
        (lambda: industrial_views(32, light=-1.0), "`light` must be >= 0"),
        (lambda: industrial_views(32, occlusion=-1.0), r"`occlusion` must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_pasting_into_a_batch_of_half_precision_stays_in_range():
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    for operation in (FusedCutPaste(), FusedScratch(), FusedDent()):
        view = operation(images)
        assert view.dtype == torch.float64
        torch.testing.assert_close(view.clamp(0, 1), view, **f32(NETWORK))
