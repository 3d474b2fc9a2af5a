"""LiDAR against plain loops, and its grouping."""

import math

import numpy as np
import pytest
import torch

from lightning_contrast.metrics import LiDAR, lidar
from tests.launch import run_processes
from tests.tolerances import ROUNDED, near


def views(images=30, count=4, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(images, 1, width, generator=g) * torch.linspace(2, 0.2, width)
    return centers + 0.3 * torch.randn(images, count, width, generator=g) + 1.5


def lidar_by_hand(groups, delta=1e-4):
    """Take a list of (q_i, D) arrays, one for each image."""
    width = groups[0].shape[1]
    means = [sum(group) / len(group) for group in groups]
    mean = sum(means) / len(means)
    between, within = np.zeros((width, width)), np.zeros((width, width))
    for group, own in zip(groups, means, strict=True):
        between += np.outer(own - mean, own - mean) / len(groups)
        for row in group:
            within += np.outer(row - own, row - own) / len(group) / len(groups)
    eigenvalues = np.linalg.eigvals(np.linalg.solve(within + delta * np.eye(width), between)).real.clip(min=0)
    entropy = 0.0
    for value in eigenvalues:
        p = value / eigenvalues.sum() + 1e-7
        entropy -= p * math.log(p)
    return math.exp(entropy)


def arrays(x):
    return [group.double().numpy() for group in x]


def test_lidar_equals_plain_loops():
    x = views()
    assert lidar(x).item() == near(lidar_by_hand(arrays(x)), ROUNDED)
    assert lidar(x, delta=0.5).item() == near(lidar_by_hand(arrays(x), delta=0.5), ROUNDED)


def test_rows_are_grouped_by_image_in_any_form():
    x = views()
    expected = lidar_by_hand(arrays(x))
    assert lidar(list(x.unbind(dim=1))).item() == near(expected, ROUNDED)  # views as a batch holds them
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    images = torch.arange(30).repeat_interleave(4) * 7 + 3
    assert lidar(x.flatten(0, 1)[order], images[order]).item() == near(expected, ROUNDED)
    wrong = lidar(x.flatten(0, 1)[order].view(30, 4, 6)).item()
    assert abs(wrong - expected) > 0.1


def test_images_with_unequal_numbers_of_views_count_the_same():
    x = views()
    groups = [x[i, : 2 + i % 3] for i in range(30)]
    images = torch.arange(30).repeat_interleave(torch.tensor([len(group) for group in groups]))
    assert lidar(torch.cat(groups), images).item() == near(lidar_by_hand(arrays(groups)), ROUNDED)


def test_the_metric_takes_images_in_parts():
    x = views()
    metric = LiDAR()
    metric.update(x[:11])
    metric.update(list(x[11:].unbind(dim=1)))
    assert metric.compute().item() == near(lidar_by_hand(arrays(x)), ROUNDED)
    assert metric.within.shape == metric.outer.shape == (6, 6)


@pytest.mark.dist
def test_two_ranks_count_all_images():
    x = views()

    def on_rank(rank):
        metric = LiDAR()
        metric.update(x[:11] if rank == 0 else x[11:])
        return metric.compute().item()

    assert run_processes(on_rank, 2) == [near(lidar_by_hand(arrays(x)), ROUNDED)] * 2


def test_two_directions_that_tell_images_apart_count_two():
    g = torch.Generator().manual_seed(0)
    x = 0.01 * torch.randn(400, 5, 8, generator=g)
    x[:, :, :2] += torch.randn(400, 1, 2, generator=g)
    assert lidar(x).item() == pytest.approx(2, abs=0.1)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`groups` must have at least two rows each, got 1"):
        lidar(torch.ones(5, 1, 3))
    with pytest.raises(ValueError, match="`features` must be 3-D if `groups` is None"):
        lidar(torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"`groups` must be integers of shape \(5,\)"):
        lidar(torch.ones(5, 3), torch.ones(4))
    with pytest.raises(ValueError, match="`features` must be views of equal 2-D shapes"):
        lidar([torch.ones(5, 3), torch.ones(4, 3)])
    with pytest.raises(ValueError, match="`features` must contain at least two images"):
        lidar(torch.ones(1, 5, 3))
    with pytest.raises(ValueError, match="`delta` must be > 0"):
        LiDAR(delta=0)
    metric = LiDAR()
    metric.update(torch.ones(3, 2, 4))
    with pytest.raises(ValueError, match="`features` must be 4 wide"):
        metric.update(torch.ones(3, 2, 5))
