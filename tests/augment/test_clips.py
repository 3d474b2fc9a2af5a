"""Views of clips: the temporal crops, augmentation that is the same over time, and what is refused."""

import numpy as np
import pytest
import torch

from lightning_contrast.augment import ViewSpec, clip_distance, clip_views, cpc_clip_views, vjepa_views
from lightning_contrast.testing import HostSyncs
from tests.tolerances import CANCELLING, f32, near

STILL = ViewSpec(8, (1.0, 1.0), gray_p=0.0, flip=0.0, ratio=(1.0, 1.0))


def numbered(batch=64, length=40):
    """Return clips whose frame t has the value t."""
    return torch.arange(length, dtype=torch.uint8)[None, :, None, None, None].expand(batch, -1, 3, 8, 8)


def places(view):
    """Return the frame numbers ``(B, T)`` of a view of `numbered`."""
    return (255 * view.mean((2, 3, 4))).round().long()


def test_known_distances():
    u = np.array([0.1, 0.25, 0.5, 0.75, 0.9, 0.0, 1 - 2**-24])
    assert clip_distance(u, 100).tolist() == [5, 13, 29, 50, 68, 0, 99]
    drawn = clip_distance(np.random.default_rng(0).random(100_000), 300)
    assert drawn.mean() == pytest.approx(100, abs=1)  # the density falls linearly: mean M / 3
    assert clip_distance(u, 1).tolist() == [0] * 7


def test_two_clips_at_a_random_distance():
    torch.manual_seed(0)
    views = clip_views(8, frames=5, stride=2, specs=[STILL, STILL])(numbered(512))
    assert [view.shape for view in views] == [(512, 5, 3, 8, 8)] * 2
    first, second = (places(view) for view in views)
    assert (first.diff(dim=1) == 2).all()
    assert (second.diff(dim=1) == 2).all()
    assert first.min() == 0
    assert first.max() == 39
    distance = (first - second)[:, 0]
    starts = 40 - 8
    assert distance.abs().double().mean() == pytest.approx(starts / 3 - 0.5, abs=1.2)
    assert 200 < (distance > 0).sum() < 300  # in random order


def test_the_single_clip_of_predictive_coding_starts_anywhere():
    torch.manual_seed(0)
    (view,) = cpc_clip_views(8, frames=10, stride=3, color=False)(numbered(512).float() / 255)
    assert view.shape == (512, 10, 3, 8, 8)
    start = np.array([0, 40 - 27 - 1])
    (still,) = clip_views(8, frames=10, stride=3, specs=[STILL])(numbered(512))
    assert (places(still).diff(dim=1) == 3).all()
    assert np.array_equal([places(still).min(), places(still)[:, 0].max()], start)
    (jittered,) = cpc_clip_views(8, frames=4)(torch.full((16, 4, 3, 8, 8), 0.4))
    assert torch.equal(jittered, jittered[:, :1].expand_as(jittered))  # all frames alike
    assert len(jittered[:, 0].flatten(1).unique(dim=0)) > 8
    with pytest.raises(ValueError, match="`clips` must have at least 24 frames, got 23"):
        cpc_clip_views(8)(numbered(2, length=23))
    for argument in ("frames", "stride", "size"):
        with pytest.raises(ValueError, match=f"`{argument}` must be >= 1"):
            cpc_clip_views(**({"size": 8} | {argument: 0}))


def test_the_single_clip_of_v_jepa_has_one_crop_for_all_frames():
    torch.manual_seed(0)
    still = vjepa_views(8, frames=6, stride=4, scale=(1.0, 1.0), flip=0.0)
    (view,) = still(numbered(256).float() / 255)
    assert view.shape == (256, 6, 3, 8, 8)
    found = places(view)
    assert (found.diff(dim=1) == 4).all()
    assert (found[:, 0].min(), found[:, 0].max()) == (0, 40 - 5 * 4 - 1)
    columns = torch.arange(8.0)[None, None, None, None].expand(64, 6, 3, 8, 8) / 8
    (cropped,) = vjepa_views(8, frames=6, stride=1)(columns)
    torch.testing.assert_close(cropped, cropped[:, :1].expand_as(cropped), **f32(CANCELLING))  # all frames alike
    assert (cropped[:, 0, 0, 0].diff(dim=1).mean(1) < 0).float().mean().item() == pytest.approx(0.5, abs=0.25)  # flips
    for argument in ("frames", "stride", "size"):
        with pytest.raises(ValueError, match=f"`{argument}` must be >= 1"):
            vjepa_views(**({"size": 8} | {argument: 0}))


def test_local_clips_lie_one_after_another_in_the_global_one():
    torch.manual_seed(0)
    policy = clip_views(8, frames=4, stride=4, local_clips=4, specs=[STILL, STILL])
    views = [places(view) for view in policy(numbered())]
    assert len(views) == 10
    start = views[0][:, 0]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], start[:, None] + 4 * torch.arange(4))
    for j in range(4):
        assert torch.equal(views[2 + j], start[:, None] + 4 * j + torch.arange(4))
        assert torch.equal(views[6 + j], views[2 + j])
    assert start.min() == 0
    assert start.max() == 40 - 16


def test_all_frames_of_a_clip_share_a_draw():
    spec = ViewSpec(8, (0.2, 0.5), (0.4, 0.4, 0.4, 0.1), blur_p=0.5, solarize_p=0.5)
    still = torch.randint(0, 256, (6, 1, 3, 16, 16), dtype=torch.uint8).expand(-1, 4, -1, -1, -1)
    for backend in ("cpu", "accelerator"):
        torch.manual_seed(0)
        for view in clip_views(8, frames=4, stride=1, specs=[spec, spec], backend=backend)(still):
            torch.testing.assert_close(view, view[:, :1].expand_as(view), **f32(CANCELLING))
            assert (view[0] - view[1]).abs().max() > 0.01
    each = clip_views(8, frames=4, stride=1, specs=[spec, spec], consistent=False)(still)[0]
    assert (each - each[:, :1]).abs().amax((1, 2, 3, 4)).min() > 0.01


def test_evaluation_takes_the_middle():
    policy = clip_views(8, frames=4, stride=2, mean=[0.5] * 3, std=[0.5] * 3)
    clip = policy.eval_transform(numbered(2, length=11))
    assert clip.shape == (2, 4, 3, 8, 8)
    assert places(clip / 2 + 0.5)[0].tolist() == [2, 4, 6, 8]
    assert policy.input_spec == {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert clip[0, 0, 0, 0, 0] == near((2 / 255 - 0.5) / 0.5)


def test_short_clips_are_refused():
    policy = clip_views(8, frames=4, stride=4)
    hint = r"`clips` must have at least 13 frames, got 12. Load longer clips, or lower `frames` \(4\)"
    for call in (policy, policy.eval_transform):
        with pytest.raises(ValueError, match=hint):
            call(numbered(2, length=12))
        with pytest.raises(ValueError, match=r"shape \(B, T, C, H, W\)"):
            call(numbered(2)[:, 0])
    assert len(policy(numbered(2, length=13))) == 2
    with pytest.raises(ValueError, match="at least 16 frames"):
        clip_views(8, frames=4, stride=4, local_clips=4)(numbered(2, length=15))


def test_one_frame_clips_are_images():
    (first, second) = clip_views(8, frames=1)(numbered(4, length=1))
    assert first.shape == second.shape == (4, 1, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"frames": 0}, "frames"),
        ({"stride": 0}, "stride"),
        ({"local_clips": 1}, "local_clips"),
        ({"local_clips": 4, "stride": 3}, "local_clips"),
        ({"specs": [STILL] * 3}, "specs"),
        ({"specs": [STILL], "local_clips": 2}, "specs"),
        ({"specs": [STILL, ViewSpec(9, (0.5, 1.0))]}, "specs"),
    ],
)
def test_arguments_are_checked(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        clip_views(8, **arguments)


def numbers(view):
    """Return crop, aspect, flip, jitter and its p, gray, blur and solarization of a view."""
    found = {type(operation).__name__: operation for operation in view.operations}
    crop, color = found["FusedResizedCrop"], found["FusedColorJitter"]
    jitter = (color.brightness, color.contrast, color.saturation, color.hue)
    rest = [getattr(found.get(name), "probability", 0.0) for name in ("FusedGaussianBlur", "FusedSolarize")]
    return [crop.scale, crop.ratio, crop.flip, jitter, color.probability, color.grayscale, *rest]


def test_published_numbers():
    crops, jitter = [(0.3, 1.0), (0.5, 2.0), 0.5], (0.8, 0.8, 0.8, 0.2)
    first, second = clip_views(224).views
    assert numbers(first) == [*crops, jitter, 0.8, 0.2, 1.0, 0.0]
    assert numbers(second) == [*crops, jitter, 0.8, 0.2, 0.1, 0.2]
    first, second = clip_views(112, stride=4, local_clips=4).views
    assert numbers(first) == numbers(second)
    assert numbers(first) == [(0.36, 1.0), (1.0, 1.0), 0.5, (0.25, 0.25, 0.25, 0.1), 0.3, 0.175, 0.0, 0.0]


@pytest.mark.parametrize("local_clips", [0, 4])
def test_nothing_is_read_from_the_device(local_clips):
    """The meta device has no values: reading one is an error, and so is mixing in a tensor on the host."""
    policy = clip_views(16, frames=4, stride=4, local_clips=local_clips, mean=[0.5] * 3, std=[0.2] * 3)
    with HostSyncs() as syncs:
        for clips in (torch.empty(4, 16, 3, 20, 20, dtype=torch.uint8), torch.empty(4, 16, 3, 20, 20)):
            assert all(view.is_meta for view in policy(clips.to("meta")))
            assert policy.eval_transform(clips.to("meta")).is_meta
    assert not syncs.places
