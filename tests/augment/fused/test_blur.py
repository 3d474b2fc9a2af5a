"""The fused blur against torchvision's."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from lightning_contrast.augment.fused import FusedGaussianBlur
from lightning_contrast.augment.fused.base import to_device
from tests.tolerances import NETWORK, f32

CPU = torch.device("cpu")


def run(operation, images, draw):
    return operation.compute_(images.clone(), to_device(operation.prepare(draw), CPU))


@pytest.mark.parametrize("backend", ["cpu", "accelerator"])
@pytest.mark.parametrize("kernel_size", [3, 5, 9, 23, None])
@pytest.mark.parametrize("shape", [(32, 32), (32, 20), (70, 90), (96, 80), (17, 113)])
def test_equals_torchvision(shape, kernel_size, backend):
    """Taps beyond 4 sigma are left out; they weigh 6e-5."""
    if kernel_size == 23 and shape in {(32, 20), (17, 113)}:
        pytest.skip("torchvision cannot reflect 11 pixels twice")
    torch.manual_seed(0)
    images = torch.rand(12, 3, *shape, dtype=torch.float64)
    operation = FusedGaussianBlur(0.5, kernel_size=kernel_size, backend=backend)
    draw = operation.draw(12, *shape)
    assert 0 < draw["blurred"].sum() < 12
    result = run(operation, images, draw)
    for view, image, blurred, sigma in zip(result, images, draw["blurred"], draw["sigma"], strict=True):
        size = kernel_size or 17
        expected = TF.gaussian_blur(image, [size, size], [float(sigma)] * 2) if blurred else image
        torch.testing.assert_close(view, expected, **f32(NETWORK))
        assert blurred or torch.equal(view, image)


@pytest.mark.parametrize("backend", ["cpu", "accelerator"])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_images_smaller_than_the_kernel(size, backend):
    torch.manual_seed(0)
    images = torch.rand(4, 3, size, size)
    operation = FusedGaussianBlur(1.0, (2.0, 2.0), backend=backend)
    result = run(operation, images, operation.draw(4, size, size))
    assert result.shape == images.shape
    constant = run(operation, torch.full_like(images, 0.3), operation.draw(4, size, size))
    torch.testing.assert_close(constant, torch.full_like(images, 0.3))
    assert size == 1 or result.std() < images.std()


def test_rate_and_range():
    torch.manual_seed(0)
    draw = FusedGaussianBlur(0.1, (0.5, 1.5)).draw(20000, 8, 8)
    assert draw["blurred"].mean() == pytest.approx(0.1, abs=0.01)
    assert draw["sigma"].min() == pytest.approx(0.5, abs=0.01)
    assert draw["sigma"].max() == pytest.approx(1.5, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": -0.5}, "`p` must lie in"),
        ({"sigma": (2.0, 0.1)}, "`sigma` must be an ordered pair above 0"),
        ({"sigma": (0.0, 1.0)}, "`sigma` must be an ordered pair above 0"),
        ({"kernel_size": 4}, "`kernel_size` must be odd"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedGaussianBlur(**arguments)
