"""The fused crop against interpolate and torchvision on the same boxes."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from lightning_contrast.augment.fused import FusedResizedCrop
from lightning_contrast.augment.fused.base import to_device
from lightning_contrast.augment.fused.resample import apply_weights, resize_weights, tabulated_weights
from tests.tolerances import FORMULA, NETWORK, ROUNDED, f32, f64

BOXES = torch.tensor(
    [[0, 0, 100, 130], [10, 20, 7, 5], [60, 90, 40, 40], [3, 100, 90, 30], [99, 0, 1, 1], [5, 5, 33, 64]]
)
FLIPS = torch.tensor([False, True, True, False, False, True])


def plan_of(operation, boxes=BOXES, flips=FLIPS):
    draw = {"box": boxes.float().numpy(), "flip": flips.numpy()}
    return to_device(operation.prepare(draw), torch.device("cpu"))


def expected(images, size, mode, antialias):
    """Crop, interpolate and flip one by one."""
    views = []
    for image, (top, left, height, width), flip in zip(images, BOXES.tolist(), FLIPS.tolist(), strict=True):
        crop = image[None, :, top : top + height, left : left + width]
        view = F.interpolate(crop, (size, size), mode=mode, antialias=antialias)[0]
        views.append(view.flip(-1) if flip else view)
    return torch.stack(views)


@pytest.mark.parametrize("backend", ["cpu", "accelerator"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [1, 17, 64, 150])
def test_crop_equals_interpolate(photos, size, interpolation, antialias, backend):
    images = photos.double() / 255
    operation = FusedResizedCrop(size, interpolation=interpolation, antialias=antialias, backend=backend)
    views = operation.compute_(images, plan_of(operation))
    reference = expected(images, size, interpolation, antialias).clamp(0, 1)
    torch.testing.assert_close(views, reference, **f32(FORMULA))


@pytest.mark.parametrize("backend", ["cpu", "accelerator"])
def test_nearest_is_nearest_exact(photos, backend):
    images = photos.double() / 255
    operation = FusedResizedCrop(48, interpolation="nearest", backend=backend)
    reference = expected(images, 48, "nearest-exact", False)
    torch.testing.assert_close(operation.compute_(images, plan_of(operation)), reference, **f64(NETWORK))


def test_uint8_is_that_of_torchvision(photos):
    """Large uint8 images stay uint8 through the resampling: the same 8-bit values as torchvision's."""
    operation = FusedResizedCrop(96, interpolation="bicubic", backend="cpu")
    views = operation.compute_(photos, plan_of(operation))
    for view, image, (top, left, height, width), flip in zip(
        views, photos, BOXES.tolist(), FLIPS.tolist(), strict=True
    ):
        reference = TF.resized_crop(image, top, left, height, width, [96, 96], v2.InterpolationMode.BICUBIC)
        reference = reference.flip(-1) if flip else reference
        torch.testing.assert_close(view, reference / 255)


def test_products_take_uint8(emoji):
    operation = FusedResizedCrop(32)
    boxes = torch.tensor([[0, 0, 32, 32], [4, 8, 20, 16], [1, 1, 30, 25]])
    plan = plan_of(operation, boxes, torch.tensor([False, True, False]))
    views = operation.compute_(emoji[:3], plan)
    torch.testing.assert_close(views[0], emoji[0] / 255, **f32(ROUNDED))
    torch.testing.assert_close(views, operation.compute_(emoji[:3] / 255, plan), **f32(ROUNDED))


def test_weights_are_exact_in_float64():
    start, length = torch.tensor([3.0, 0.0]).double(), torch.tensor([40.0, 9.0]).double()
    weights = resize_weights(start, length, 50, 16, interpolation="bilinear")
    row = torch.rand(2, 1, 1, 50, dtype=torch.float64)
    identity = torch.ones(2, 1, 1, dtype=torch.float64)
    result = apply_weights(row, identity, weights)
    for i, (first, count) in enumerate([(3, 40), (0, 9)]):
        crop = row[i : i + 1, ..., first : first + count]
        torch.testing.assert_close(result[i : i + 1], F.interpolate(crop, (1, 16), mode="bilinear", antialias=True))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 16, dtype=torch.float64))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [1, 7, 12, 20])
def test_table_holds_the_weights_of_every_crop(size, interpolation, antialias):
    crops = [(start, length) for length in range(1, 13) for start in range(13 - length)]
    start, length = torch.tensor(crops * 2).float().T
    flip = torch.arange(len(start)) >= len(crops)
    style = {"flip": flip, "interpolation": interpolation, "antialias": antialias}
    table = tabulated_weights(start, length, 12, size, **style)
    torch.testing.assert_close(table, resize_weights(start, length, 12, size, **style), **f32(ROUNDED))
    plain = tabulated_weights(start, length, 12, size, interpolation=interpolation, antialias=antialias)
    assert torch.equal(plain, table[: len(crops)].repeat(2, 1, 1))
    table.zero_()  # a look-up is a copy: nothing that is done to it reaches the table
    assert tabulated_weights(start, length, 12, size, **style).abs().sum() > 0


def test_no_table_for_large_images():
    start, length = torch.tensor([0.0]), torch.tensor([64.0])
    assert tabulated_weights(start, length, 64, 64) is None
    assert tabulated_weights(start, length[:1] / 2, 32, 32).dtype == torch.float32


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 90), (200, 30)])
def test_boxes_are_distributed_like_those_of_torchvision(height, width):
    """Means and quantiles of area share, log aspect and position over 4,000 boxes."""
    torch.manual_seed(0)
    count, scale, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
    ours = torch.from_numpy(FusedResizedCrop(8, scale, ratio).draw(count, height, width)["box"])
    image = torch.empty(3, height, width)
    transform = v2.RandomResizedCrop(8, scale, ratio)
    params = [transform.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params]).float()

    def statistics(box):
        area = box[:, 2] * box[:, 3] / (height * width)
        place = torch.stack([area, (box[:, 3] / box[:, 2]).log(), box[:, 0] / height, box[:, 1] / width])
        return torch.cat([place.mean(1, keepdim=True), place.quantile(torch.tensor([0.1, 0.5, 0.9]), 1).T], 1)

    torch.testing.assert_close(statistics(ours), statistics(theirs), atol=0.035, rtol=0)
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


def test_impossible_aspect_takes_the_largest_centered_box():
    box = FusedResizedCrop(8, (1.0, 1.0), (1.0, 1.0)).draw(5, 20, 50)["box"]
    assert box.tolist() == [[0, 15, 20, 20]] * 5
    box = FusedResizedCrop(8, (1.0, 1.0), (1.0, 1.0)).draw(5, 50, 20)["box"]
    assert box.tolist() == [[15, 0, 20, 20]] * 5


def test_clamped_boxes_fill_one_side():
    torch.manual_seed(0)
    box = FusedResizedCrop(8, (1.0, 1.0), fit="clamp").draw(200, 40, 40)["box"]
    assert ((box[:, 2] == 40) | (box[:, 3] == 40)).all()
    assert (box[:, 2:] < 40).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "`size` must be >= 1"),
        ({"size": 8.0}, "`size` must be a whole number"),
        ({"scale": (1.0, 0.08)}, "`scale` must be an ordered pair"),
        ({"scale": (0.0, 1.0)}, "`scale` must start above 0"),
        ({"scale": (0.5, 1.5)}, "`scale` must be an ordered pair inside"),
        ({"ratio": (2.0, 1.0)}, "`ratio` must be an ordered pair"),
        ({"flip": 1.5}, "`flip` must lie in"),
        ({"interpolation": "bilinaer"}, "Did you mean 'bilinear'"),
        ({"fit": "crop"}, "`fit` must be one of"),
        ({"backend": "gpu"}, "`backend` must be one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FusedResizedCrop(**{"size": 8, **arguments})
