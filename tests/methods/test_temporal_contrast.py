"""Temporal contrast's own properties: TCLR's sum, its switches, backbones of clips, and batches that are refused."""

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.nn import VideoBackbone, build_clip_backbone, clip_steps, project_moments
from tests.methods.cases import TinyBackbone
from tests.methods.test_contract import run_step
from tests.tolerances import CANCELLING, f32


def model(backbone="small_video_convnet", **settings):
    torch.manual_seed(0)
    settings = {"projection_dim": 8} | settings
    if backbone == "small_video_convnet":
        settings["backbone_kwargs"] = {"width": 2}
    return lc.TemporalContrast(backbone, **settings)


def views(count=10, frames=4, batch=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(batch, frames, 3, 16, 16, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0), (0.0, 1.0, 0.0), (1.0, 0.0, 2.0)])
def test_the_loss_is_the_weighted_sum_of_the_papers(weights):
    names = ("instance_weight", "local_weight", "global_local_weight")
    module = model(**dict(zip(names, weights, strict=True)))
    clips = views()
    steps = [module.backbone(view, steps=True) for view in clips]  # (B, 4, F)
    pooled = [module.projector(each.mean(1)) for each in steps]
    local = torch.stack([torch.stack(pooled[2:6]), torch.stack(pooled[6:])])
    each = [module.projector(s.flatten(0, 1)).unflatten(0, (3, 4)).transpose(0, 1) for s in steps[:2]]
    instance = losses.nt_xent(*pooled[:2], temperature=0.1) + losses.tclr_instance_loss(local, temperature=0.1)
    terms = [
        instance,
        losses.tclr_local_loss(local, temperature=0.1),
        losses.tclr_global_local_loss(torch.stack(each), local, temperature=0.1),
    ]
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    out = run_step(module, (clips, torch.zeros(3)))
    torch.testing.assert_close(out["loss"], expected, **f32(CANCELLING, size=float(expected.detach())))
    torch.testing.assert_close(out["features"], steps[0].mean(1).detach(), **f32(CANCELLING))


def test_instance_alone_is_nt_xent_of_two_clips():
    module = model(local_weight=0.0, global_local_weight=0.0, temperature=0.3)
    clips = views(2)
    projections = [module.projector(module(view)) for view in clips]
    torch.testing.assert_close(run_step(module, (clips, None))["loss"], losses.nt_xent(*projections, temperature=0.3))


def test_one_frame_clips_train_the_instance_loss_and_no_other():
    frames = [torch.rand(3, 3, 16, 16) for _ in range(2)]
    module = model(local_weight=0.0, global_local_weight=0.0)
    expected = run_step(module, ([frame[:, None] for frame in frames], None))["loss"]
    torch.testing.assert_close(run_step(module, (frames, None))["loss"], expected)
    with pytest.raises(ValueError, match="`views` must give a multiple of 4 time steps per global clip, got 1"):
        run_step(model(), (views(frames=1), None))


def test_another_number_of_views_is_refused():
    with pytest.raises(ValueError, match="hold 10 views, got 2"):
        run_step(model(), (views(2), None))
    with pytest.raises(ValueError, match="hold 2 views, got 10"):
        run_step(model(local_weight=0.0, global_local_weight=0.0), (views(), None))
    with pytest.raises(ValueError, match="hold 6 views"):
        run_step(model(local_clips=2), (views(), None))


def test_steps_in_a_row_are_averaged_to_the_moments():
    module = model(TinyBackbone(), local_clips=2)
    clips = views(6, frames=4)
    moments = project_moments(module.projector, clip_steps(module.backbone, clips[0]), 2)
    by_hand = torch.stack([module.backbone(clips[0][:, t]) for t in range(4)], 1)  # (B, 4, F)
    pooled = torch.stack([by_hand[:, :2].mean(1), by_hand[:, 2:].mean(1)], 1)
    expected = module.projector(pooled.flatten(0, 1)).unflatten(0, (3, 2)).transpose(0, 1)
    torch.testing.assert_close(moments, expected, **f32(CANCELLING))


def test_forward_is_the_mean_over_time():
    clips = views(1)[0]
    frame_wise = model(TinyBackbone()).eval()
    expected = torch.stack([frame_wise.backbone(frame) for frame in clips.unbind(1)]).mean(0)
    torch.testing.assert_close(frame_wise(clips), expected, **f32(CANCELLING))
    video = model().eval()
    torch.testing.assert_close(video(clips), video.backbone(clips))
    there, back = video(clips), video(clips.flip(1))
    assert (there - back).abs().max() > 0.1 * there.abs().max()  # it sees the order of the frames
    with pytest.raises(ValueError, match=r"shape \(B, T, C, H, W\)"):
        video(clips[0, 0])


@pytest.mark.parametrize(
    ("name", "kwargs", "steps"),
    [("r3d_18", {}, 2), ("r3d_18", {"keep_time": True}, 4), ("mc3_18", {}, 16), ("r2plus1d_18", {}, 2)],
)
@pytest.mark.slow
def test_torchvisions_networks(name, kwargs, steps):
    backbone, width = build_clip_backbone(name, backbone_kwargs=kwargs)
    assert width == 512
    with torch.no_grad():
        clips = torch.rand(1, 16, 3, 32, 32)
        found = backbone.eval()(clips, steps=True)
        assert found.shape == (1, steps, 512)
        torch.testing.assert_close(backbone(clips), found.mean(1))


@pytest.mark.slow
def test_features_are_those_of_torchvision():
    from torchvision.models import video

    backbone, _ = build_clip_backbone("r3d_18")
    theirs = video.r3d_18(weights=None)
    theirs.fc = nn.Identity()
    for number, part in enumerate(("stem", "layer1", "layer2", "layer3", "layer4")):
        getattr(theirs, part).load_state_dict(backbone.trunk[number].state_dict())
    clips = torch.rand(2, 8, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.eval()(clips.transpose(1, 2))
        torch.testing.assert_close(backbone.eval()(clips), expected, **f32(CANCELLING))


def test_a_network_of_ones_own_and_wrong_options():
    own = VideoBackbone(nn.Conv3d(3, 5, 3), 5)
    assert model(own, local_clips=2)(torch.rand(2, 6, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(ValueError, match="small_images"):
        build_clip_backbone("r3d_18", small_images=True)
    with pytest.raises(ValueError, match="keep_time"):
        build_clip_backbone("mc3_18", backbone_kwargs={"keep_time": True})
    with pytest.raises(ValueError, match="backbone_kwargs"):
        build_clip_backbone(own, backbone_kwargs={"width": 2})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"local_clips": 1}, "local_clips"),
        ({"temperature": 0.0}, "temperature"),
        ({"local_weight": -1.0}, "local_weight"),
        ({"instance_weight": 0.0, "local_weight": 0.0, "global_local_weight": 0.0}, "instance_weight"),
    ],
)
def test_arguments_are_checked(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(**arguments)


def test_views_are_published_ones():
    clips = torch.randint(0, 256, (2, 64, 3, 24, 24), dtype=torch.uint8)
    tclr = lc.TemporalContrast.views(16, frames=16, stride=4, local_clips=4)
    assert [view.shape for view in tclr(clips)] == [(2, 16, 3, 16, 16)] * 10
    cvrl = lc.TemporalContrast.views(16)
    assert [view.shape for view in cvrl(clips)] == [(2, 16, 3, 16, 16)] * 2
    first, second = cvrl.views
    assert [type(operation).__name__ for operation in second.operations][-1] == "FusedSolarize"
    assert len(second.operations) == len(first.operations) + 1
