"""The counter of kernels."""

import torch
from torch import nn

from lightning_contrast.testing import count_kernels


def test_each_operation_counts_once_and_views_and_allocations_are_free():
    x = torch.arange(6.0)
    with count_kernels() as kernels:
        y = x.view(2, 3).t()[0].unsqueeze(0).expand(2, 2).detach()
        torch.empty_like(y)
        x.new_empty(3).resize_(2)
        _ = x.split(2), x.unbind(), x.is_pinned()
        assert kernels.total == 0
        (y + 1).mul_(2)
        x.reshape(2, 3).t().reshape(6)  # the second cannot be a view
    assert dict(kernels.by_name) == {"add": 1, "mul_": 1, "clone": 1}


def test_backward_and_optimizer_count():
    layer = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=True)
    with count_kernels() as kernels:
        layer(torch.ones(4, 3).detach()).sum().backward()
    assert kernels.by_name["mm"] == 2  # forward and the gradient of the weight
    before = kernels.total
    with count_kernels() as kernels:
        optimizer.step()
    assert kernels.by_name == {"_foreach_add_": 1}
    assert before > 2


def test_operations_on_the_host_do_not_count_where_a_device_takes_part():
    there = torch.empty(4, device="meta")
    with count_kernels() as kernels:
        there + torch.rand(()).mul(2)
        torch.rand(4).to("meta")
    assert dict(kernels.by_name) == {"add": 1, "_to_copy": 1}
