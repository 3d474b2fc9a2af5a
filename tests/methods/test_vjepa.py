"""V-JEPA: the step in plain torch, what is predicted from what, clips and images, views, and bad input."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast.nn import TubeletViT, sincos_positions_3d
from tests.methods.cases import TinyBackbone, same_tubelets, tiny_video_vit
from tests.plain_transformer import below, blocks, linear, norm
from tests.tolerances import NETWORK, f64, near

SMALL = {"predictor_dim": 16, "predictor_depth": 1}


def others(clips, grid, generator=None):
    """Hide other tubelets of each clip, and other numbers of them."""
    return torch.stack([torch.arange(32) % (i + 3) == 0 for i in range(clips)])


def model(**kwargs):
    torch.manual_seed(0)
    module = lc.VJEPA(tiny_video_vit(), **(SMALL | {"masks": [same_tubelets, others]} | kwargs)).double()
    module.log = lambda *a, **k: None
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))  # also what starts at zero or one
    return module


def clips_of(count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 4, 3, 16, 16, generator=generator, dtype=torch.float64)


def plain(w, clip, keep):
    """Return the tokens of one clip (T, C, H, W): time by time, row by row."""
    place, tokens = sincos_positions_3d(16, 4, 2, uniform_power=True).double(), []
    for time in range(2):
        for row in range(4):
            for column in range(4):
                cut = clip[2 * time : 2 * time + 2, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                tokens.append((w["embed.weight"] * cut.transpose(0, 1)).sum((1, 2, 3, 4)) + w["embed.bias"])
    return norm(blocks((torch.stack(tokens) + place)[keep], w, 2), w, "norm")


def test_the_step_in_plain_torch():
    module, clips = model(), clips_of()
    w = {name: value.detach() for name, value in module.state_dict().items()}
    encoder, teacher, predictor = (below(w, f"{name}.") for name in ("backbone", "momentum_backbone", "predictor"))
    place, kinds = sincos_positions_3d(16, 4, 2, uniform_power=True).double(), []
    for kind, sampler in enumerate((same_tubelets, others)):
        masks, total = sampler(2, None), []
        shown = int((~masks).sum(1).min())
        least = int(masks.sum(1).min())
        for clip, mask in zip(clips, masks, strict=True):
            visible, hidden = (~mask).nonzero()[:shown, 0], mask.nonzero()[:least, 0]
            seen = linear(plain(encoder, clip, visible), predictor, "enter") + place[visible]
            x = torch.cat([seen, predictor["mask_token"][kind] + place[hidden]])
            x = linear(norm(blocks(x, predictor, 2), predictor, "norm"), predictor, "leave")[shown:]
            target = F.layer_norm(plain(teacher, clip, slice(None)), (16,))[hidden]
            total.append((x - target).abs().mean())
        kinds.append(sum(total) / 2)
    loss = module.training_step([[clips]], 0)["loss"]
    torch.testing.assert_close(loss, sum(kinds) / 2, **f64(NETWORK))


def test_features_of_a_step_do_not_see_what_is_hidden():
    module, clips = model(masks=[same_tubelets]), clips_of()
    hidden = same_tubelets(2, None).view(2, 2, 1, 4, 4)
    hidden = hidden.repeat_interleave(2, 1).repeat_interleave(4, 3).repeat_interleave(4, 4)
    first = module.training_step([[clips]], 0)["features"]
    same = module.training_step([[clips + 5 * hidden]], 0)["features"]
    torch.testing.assert_close(same, first, **f64(NETWORK))
    assert not torch.allclose(module.training_step([[clips + 5 * ~hidden]], 0)["features"], first)


def test_an_image_is_a_clip_that_stands_still():
    module, image = model(), clips_of()[:, 0]
    torch.testing.assert_close(module(image), module(image[:, None].repeat(1, 4, 1, 1, 1)), **f64(NETWORK))
    assert not torch.allclose(module(clips_of()), module(image))


def test_the_papers_masks_and_tokens():
    module = lc.VJEPA("small_video_vit")
    short, long = (sampler(50, module.backbone.grid, generator=torch.Generator()) for sampler in module.mask_samplers)
    assert short.shape == long.shape == (50, 64)
    assert long.float().mean() > short.float().mean()
    assert module.predictor.mask_token.shape == (2, 384)
    assert not module.predictor.mask_token.any()
    assert module.schedules.clip_grad == 10


def test_gradients_of_encoder_and_predictor_are_clipped_apart():
    module = model()
    parts = [list(part.parameters()) for part in (module.backbone, module.predictor)]
    for scale, part in zip((3.0, 0.01), parts, strict=True):
        for parameter in part:
            parameter.grad = torch.full_like(parameter, scale)
    before = [torch.cat([p.grad.flatten() for p in part]) for part in parts]
    module.clip(None, 2.0)
    for part, gradient in zip(parts, before, strict=True):
        found = torch.cat([p.grad.flatten() for p in part])
        assert found.norm().item() == near(min(2.0, gradient.norm().item()), NETWORK)


def test_views_are_one_clip_of_the_video():
    video = torch.arange(24).view(1, 24, 1, 1, 1).expand(2, -1, 3, 8, 8).to(torch.uint8)
    policy = lc.VJEPA.views(8, frames=4, stride=3, flip=0.0)
    starts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        (view,) = policy(video)
        assert view.shape == (2, 4, 3, 8, 8)
        frames = (255 * view[:, :, 0, 4, 4]).round()
        assert (frames.diff(dim=1) == 3).all()
        starts |= {*frames[:, 0].tolist()}
    assert starts == set(range(15))
    assert policy.eval_transform(video).shape == (2, 4, 3, 8, 8)


NETWORK_SIZES = {"frames": 4, "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
ERRORS = {
    "name": (lambda: lc.VJEPA("small_vit"), "`backbone` must be one of 'small_video_vit'"),
    "frames": (lambda: TubeletViT(**NETWORK_SIZES | {"frames": 5}), "`frames` must be a multiple of the 2 frames"),
    "patches": (
        lambda: TubeletViT(**NETWORK_SIZES | {"patch_size": 5}),
        "`img_size` must be a multiple of `patch_size`",
    ),
    "width": (lambda: TubeletViT(**NETWORK_SIZES | {"embed_dim": 15}), "`embed_dim` must be even and a multiple"),
    "clip": (lambda: model()(clips_of()[:, :2]), r"`clips` must be \(B, 4, 3, 16, 16\)"),
    "masks": (lambda: lc.VJEPA(tiny_video_vit(), masks=[]), "`masks` must be a list of at least one sampler"),
    "all hidden": (lambda: lc.VJEPA(tiny_video_vit(), long_scale=1.0), "`scale` must leave something visible"),
    "heads": (lambda: lc.VJEPA("small_video_vit", predictor_dim=16), "`predictor_dim` must be a multiple of 4 and of"),
    "exponent": (lambda: lc.VJEPA(tiny_video_vit(), exponent=0), "`exponent` must be > 0"),
    "stem": (lambda: lc.VJEPA("small_video_vit", small_images=True), "`small_images` must be False"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match="`backbone` must be a transformer that can drop tubelets"):
        lc.VJEPA(TinyBackbone())
