"""Views of several sizes: one pass for each size, the order kept, clear errors."""

import pytest
import torch
from torch import nn

from lightning_contrast.nn.multi_crop import forward_by_size
from tests.methods.cases import TinyBackbone, make


def crops(*sizes, batch=4, dtype=torch.float32):
    """Return seeded views of these sizes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(batch, 3, size, size, generator=generator, dtype=dtype) for size in sizes]


class Calls(nn.Module):
    """A backbone that remembers what it got."""

    def __init__(self):
        super().__init__()
        self.backbone, self.shapes = TinyBackbone(), []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return self.backbone(images)


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [
        ((16, 16), [(8, 16)]),
        ((16, 16, 8), [(8, 16), (4, 8)]),
        ((16, 16, 12, 8, 8), [(8, 16), (4, 12), (8, 8)]),
        ((16, 8, 16), [(4, 16), (4, 8), (4, 16)]),
    ],
)
def test_one_pass_for_each_run_of_one_size_and_the_order_is_kept(sizes, passes):
    network, views = Calls(), crops(*sizes)
    outputs = forward_by_size(network, views)
    assert [(shape[0], shape[2]) for shape in network.shapes] == passes
    assert len(outputs) == len(views)
    for view, output in zip(views, outputs, strict=True):
        torch.testing.assert_close(output, network.backbone(view))


def test_views_that_are_not_square_are_told_apart():
    network = Calls()
    forward_by_size(network, [torch.rand(2, 3, 8, 12), torch.rand(2, 3, 12, 8)])
    assert len(network.shapes) == 2


def test_a_single_view_is_not_copied():
    (view,) = crops(16)
    assert forward_by_size(lambda images: images, [view])[0].data_ptr() == view.data_ptr()


def test_batchnorm_takes_its_statistics_over_the_views_of_one_size():
    norm, views = nn.BatchNorm2d(3), crops(16, 16, 8)
    outputs = forward_by_size(norm, views)
    torch.testing.assert_close(torch.cat(outputs[:2]), nn.BatchNorm2d(3)(torch.cat(views[:2])))
    torch.testing.assert_close(outputs[2], nn.BatchNorm2d(3)(views[2]))


@pytest.mark.parametrize("sizes", [(16, 16), (16, 16, 8), (16, 16, 12, 8), (16, 16, 16, 16), (16, 12)])
def test_what_is_taken(sizes):
    views = crops(*sizes)
    found = make("SwAV").batch_crops([views, torch.arange(4)], global_views=2)
    assert all(a is b for a, b in zip(found, views, strict=True))


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (crops(16), "`batch` must hold at least 2 views, got 1. Give a policy that makes 2 global views"),
        (crops(16, 16, 16, 8), "`views` must begin with 2 global views, got '3 of one size"),
        ([crops(16)[0], crops(16, batch=3)[0]], r"`views` must have equal batch sizes, got \[4, 3\]"),
        (crops(16, 16, batch=1), "`views` must have a batch of at least 2, got 1"),
        (crops(16)[0], "`batch` must hold a list of 2 views, got 'one float32 tensor .*Add `ViewAugmentation"),
    ],
)
def test_what_is_not(views, message):
    with pytest.raises(ValueError, match=message):
        make("SwAV").batch_crops([views, torch.arange(4)], global_views=2)
