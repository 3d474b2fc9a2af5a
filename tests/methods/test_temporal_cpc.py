"""CPC over time: what a context may see, both kinds of negatives, short clips, networks that look ahead."""

import math

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.nn import TimePredictor
from tests.methods.cases import TinyBackbone
from tests.methods.test_contract import run_step
from tests.tolerances import NETWORK, assert_same_bits, f32

CLIPS = torch.rand(3, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def model(backbone=None, **settings):
    torch.manual_seed(0)
    settings = {"steps": 2, "negatives": 7, "context_dim": 4, "optimizer": "sgd", "lr": 0.05} | settings
    return lc.TemporalCPC(TinyBackbone() if backbone is None else backbone, **settings)


def test_a_context_sees_its_frame_and_earlier_ones_and_no_other():
    torch.manual_seed(0)
    predictor = TimePredictor(3, 4, 2).double()
    frames = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    for time in range(5):
        (gradient,) = torch.autograd.grad(predictor(frames)[0][:, time].sum(), frames)
        assert (gradient.abs().sum((0, 2)) > 0).tolist() == [other <= time for other in range(5)]


def test_step_with_drawn_negatives():
    module = model()
    torch.manual_seed(3)
    out = run_step(module, [CLIPS])
    frames = torch.stack([module.backbone(CLIPS[:, t]) for t in range(6)], 1)  # (3, 6, 8)
    context, _ = module.predictor.gru(frames)
    matrices = torch.stack([step.weight for step in module.predictor.steps])
    assert matrices.shape == (2, 8, 4)
    torch.manual_seed(3)
    drawn = losses.draw_time_negatives(frames, steps=2, negatives=7)
    torch.testing.assert_close(out["loss"], losses.cpc_time_loss(context, frames, matrices, *drawn), **f32(NETWORK))
    torch.testing.assert_close(out["features"], frames.mean(1), **f32(NETWORK))
    torch.testing.assert_close(module.context(CLIPS), context[:, -1], **f32(NETWORK))
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_step_against_all_frames_draws_nothing():
    module = model(negatives=None)
    loss = run_step(module, [CLIPS])["loss"]
    frames = lc.nn.clip_steps(module.backbone, CLIPS)
    context, matrices = module.predictor(frames)
    torch.testing.assert_close(loss, losses.cpc_all_times_loss(context, frames, matrices), **f32(NETWORK))
    assert_same_bits(run_step(module, [CLIPS])["loss"], loss)


def test_under_autocast_the_context_has_the_precision_of_its_weights():
    module = model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = run_step(module, [CLIPS])["loss"]
        context = module.context(CLIPS)
    assert context.dtype == loss.dtype == torch.float32
    assert loss.isfinite()


def test_images_are_clips_of_one_frame_and_too_short_to_train_on():
    module = model().eval()
    torch.testing.assert_close(module(CLIPS[:, 0]), module(CLIPS[:, :1]), **f32(NETWORK))
    torch.testing.assert_close(module(CLIPS), torch.stack([module(frame) for frame in CLIPS.unbind(1)]).mean(0))
    for frames in (1, 2):
        with pytest.raises(ValueError, match=rf"`clips` must have more than 2 frames, got {frames}\. Make longer"):
            run_step(module, [CLIPS[:, :frames]])
    with pytest.raises(ValueError, match="more than 2 frames, got 1"):
        run_step(module, [CLIPS[:, 0]])


def test_frames_do_not_see_each_other():
    def norms(module):
        return {type(part) for part in module.modules() if isinstance(part, nn.BatchNorm2d | nn.GroupNorm)}

    with torch.device("meta"):
        assert norms(lc.TemporalCPC("resnet18")) == {nn.GroupNorm}
        assert nn.BatchNorm2d in norms(lc.TemporalCPC("resnet18", layer_norm=False))
        for video in ("small_video_convnet", lc.nn.VideoBackbone(nn.Conv3d(3, 5, 3), 5)):
            with pytest.raises(ValueError, match="`backbone` must see frames one by one"):
                lc.TemporalCPC(video)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"steps": 0}, "steps"), ({"negatives": 0}, "negatives"), ({"context_dim": 0}, "context_dim"), ({"lr": 0}, "lr")],
)
def test_arguments_are_checked(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        model(**arguments)


def test_it_learns_which_frame_follows():
    """A dot that moves by one pixel per frame: against all frames the loss falls far below ln(B T)."""
    torch.manual_seed(0)
    start = torch.randint(0, 16, (16, 2))
    clips = torch.zeros(16, 6, 3, 16, 16)
    for t in range(6):
        clips[torch.arange(16), t, :, start[:, 0], (start[:, 1] + t) % 16] = 1
    module = model(nn.Sequential(nn.Flatten(), nn.Linear(768, 32)), feature_dim=32, negatives=None, context_dim=32)
    optimizer = torch.optim.Adam(module.parameters(), 3e-2)
    first = last = run_step(module, [clips])["loss"]
    assert float(first.detach()) == pytest.approx(math.log(16 * 6), abs=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        last = run_step(module, [clips])["loss"]
        last.backward()
        optimizer.step()
    assert last < 0.5 * first
