"""MAE, SimMIM and data2vec: steps against plain torch, what a prediction may see, ranks, and bad input."""

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast import distributed, losses
from tests.launch import run_processes
from tests.methods.cases import TinyBackbone, make, tiny_vit
from tests.methods.test_contract import gradients, run_step
from tests.plain_transformer import below, block, blocks, linear, norm, plain_tokens, positions
from tests.tolerances import CANCELLING, NETWORK, f32, f64

PATCH, HEADS = 4, 2
NAMES = ("MAE", "SimMIM", "Data2Vec")
DOTTED = torch.arange(16).remainder(3) != 0  # 10 of 16 patches are hidden, not in order


def dotted(images, grid, generator=None):
    """Hide other patches in each image, the same number of them."""
    return torch.stack([DOTTED.roll(i) for i in range(images)])


def images_of(count=3, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(name, **kwargs):
    module = make(name, **({"mask": dotted} | kwargs)).double()
    module.log = lambda *a, **k: None
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data.add_(0.02 * torch.randn(parameter.shape))  # also what starts at zero or one
    return module


def weights_of(module):
    return {name: value.detach() for name, value in module.state_dict().items()}


def test_mae_in_plain_torch():
    module, images = model("MAE"), images_of()
    w = weights_of(module)
    encoder, decoder = below(w, "backbone."), below(w, "decoder.")
    mask = dotted(3, (4, 4))
    keep = [(~row).nonzero().squeeze(1) for row in mask]
    seen = plain_tokens(encoder, images, patch=PATCH, heads=HEADS, keep=keep)
    place = lc.nn.sincos_positions(16, (4, 4)).double()
    total = 0.0
    for image, tokens, visible, hidden in zip(images, seen, keep, mask, strict=True):
        x = decoder["mask_token"].expand(16, -1).clone()  # in raster order
        x[visible] = linear(tokens[1:], decoder, "enter")
        x = torch.cat([linear(tokens[:1], decoder, "enter"), x + place])
        x = linear(norm(blocks(x, decoder, 2), decoder, "norm"), decoder, "leave")[1:]
        for n in hidden.nonzero().squeeze(1).tolist():
            row, column = n // 4 * PATCH, n % 4 * PATCH
            pixels = image[:, row : row + PATCH, column : column + PATCH].permute(1, 2, 0).flatten()
            pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            total += (x[n] - pixels).square().mean() / mask.sum()
    torch.testing.assert_close(run_step(module, [[images]])["loss"], total, **f64(NETWORK))


def test_simmim_in_plain_torch():
    module, images = model("SimMIM"), images_of()
    w, mask, total = weights_of(module), dotted(3, (4, 4)), 0.0
    tokens = plain_tokens(below(w, "backbone."), images, patch=PATCH, heads=HEADS, mask=mask)[:, 1:]
    kernel, bias = w["decoder.0.weight"].flatten(1), w["decoder.0.bias"]
    for image, row_of_tokens, hidden in zip(images, tokens, mask, strict=True):
        for n in hidden.nonzero().squeeze(1).tolist():
            row, column = n // 4 * PATCH, n % 4 * PATCH
            pixels = image[:, row : row + PATCH, column : column + PATCH].flatten()  # channel first, as a pixel shuffle
            total += (row_of_tokens[n] @ kernel.T + bias - pixels).abs().mean() / mask.sum()
    torch.testing.assert_close(run_step(module, [[images]])["loss"], total, **f64(NETWORK))


def test_data2vec_in_plain_torch():
    module, images = model("Data2Vec", top_k=2, beta=0.5), images_of()
    for parameter in module.momentum_backbone.parameters():
        parameter.data.mul_(1.1)
    w, mask = weights_of(module), dotted(3, (4, 4))
    student = plain_tokens(below(w, "backbone."), images, patch=PATCH, heads=HEADS, mask=mask)[:, 1:]
    teacher = below(w, "momentum_backbone.masked.vit.")
    kernel = teacher["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, teacher["patch_embed.proj.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([teacher["cls_token"].expand(3, -1, -1), x], 1) + positions(teacher["pos_embed"], 4, 4, 1)
    outputs = []
    for number in range(2):
        x = block(x, below(teacher, f"blocks.{number}."), HEADS)
        outputs.append(F.layer_norm(x[:, 1:], (16,)))
    target = F.layer_norm((outputs[0] + outputs[1]) / 2, (16,))[mask]
    (kernel,) = [value for name, value in w.items() if name.startswith("predictor") and name.endswith("weight")]
    (bias,) = [value for name, value in w.items() if name.startswith("predictor") and name.endswith("bias")]
    error = (student[mask] @ kernel.T + bias - target).abs()
    expected = torch.where(error < 0.5, error**2, error - 0.25).mean()
    torch.testing.assert_close(run_step(module, [[images]])["loss"], expected, **f64(NETWORK))


@pytest.mark.parametrize("name", ["MAE", "SimMIM"])
def test_a_prediction_does_not_see_what_is_hidden(name):
    module, images = model(name), images_of()
    hidden = dotted(3, (4, 4)).view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    with torch.no_grad():
        first = module.predict_pixels(images)[1]
        torch.testing.assert_close(module.predict_pixels(images + 5 * hidden)[1], first, **f64(NETWORK))
        assert not torch.allclose(module.predict_pixels(images + 5 * ~hidden)[1], first)


@pytest.mark.parametrize("name", ["MAE", "SimMIM"])
def test_a_reconstruction_keeps_what_is_visible(name):
    module, images = model(name), images_of()
    filled, mask = module.reconstruct(images)
    assert torch.equal(mask, dotted(3, (4, 4)))
    cut, own = losses.patchify(filled, patch_size=PATCH), losses.patchify(images, patch_size=PATCH)
    assert torch.equal(cut[~mask], own[~mask])
    assert not torch.isclose(cut[mask], own[mask]).all(1).any()
    if name == "MAE":  # predictions get the mean and the deviation of the hidden pixels
        normal = losses.pixel_targets(images, patch_size=PATCH, normalize_pixels=True)
        module.predict_pixels = lambda images: (None, normal, lc.nn.split_masks(mask, mask.device))
        torch.testing.assert_close(module.reconstruct(images)[0], images, **f64(NETWORK))


@pytest.mark.slow
def test_mae_trains_towards_the_hidden_pixels_of_what_it_sees():
    torch.manual_seed(0)
    module = lc.MAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2, normalize_pixels=False)
    module.log = lambda *a, **k: None
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    seen = []
    for _ in range(60):
        images = torch.rand(16, 1, 1, 1).expand(-1, 3, 16, 16)  # of one color each: 0.083 is the best blind guess
        loss = module.training_step([[images]], 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert sum(seen[-10:]) / 10 < 0.03


def test_data2vec_moves_its_teacher_by_a_constant_momentum():
    (callback,) = make("Data2Vec", momentum=0.9).default_callbacks()
    assert (callback.start, callback.schedule) == (0.9, "constant")


def places(images):
    """Return the places of the images of a rank in the whole batch."""
    first = 3 * distributed.rank() if distributed.is_distributed() else 0
    return range(first, first + images)


def unequal(images, grid, generator=None):
    """Hide as many patches as the place of the image in the whole batch says."""
    return torch.stack([torch.arange(16) < i * 2 + 1 for i in places(images)])


def rolled(images, grid, generator=None):
    """Hide as many patches in every image, but other ones."""
    return torch.stack([DOTTED.roll(i) for i in places(images)])


MASKS_OF = {"MAE": rolled, "SimMIM": unequal, "Data2Vec": unequal}


def of_rank(rank, name):
    module = model(name, mask=MASKS_OF[name], norm=False)
    grads = gradients(module, [[images_of(5)[3 * rank : 3 * rank + 3]]])
    for gradient in grads.values():  # what DDP does
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return grads


@pytest.mark.dist
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_with_other_masks_and_numbers_of_images_give_the_gradient_of_one(name):
    alone = gradients(model(name, mask=MASKS_OF[name], norm=False), [[images_of(5)]])
    for grads in run_processes(of_rank, 2, name):
        assert grads.keys() == alone.keys()
        for key, gradient in grads.items():
            torch.testing.assert_close(gradient, alone[key], **f64(CANCELLING))


@pytest.mark.parametrize("name", NAMES)
def test_published_settings(name):
    module = getattr(lc, name)("small_vit")
    assert module.backbone.vit.global_pool == "avg"
    assert module.backbone.vit.num_prefix_tokens == 1
    images = torch.rand(2, 3, 32, 32)
    mean = module.eval().backbone.tokens(images).patches.mean(1)
    torch.testing.assert_close(module(images), mean, **f32(NETWORK))
    masks = module.mask_sampler(4, (8, 8))
    assert set(masks.sum(1).tolist()) == {{"MAE": 48, "SimMIM": 40, "Data2Vec": 40}[name]}
    fixed = module.backbone.vit.pos_embed
    assert fixed.requires_grad == (name != "MAE")
    if name == "MAE":
        assert torch.equal(fixed[0], lc.nn.sincos_positions_2d(192, 8))


def test_data2vec_averages_six_blocks_or_all():
    assert lc.Data2Vec("small_vit", backbone_kwargs={"depth": 8}).top_k == 6
    assert lc.Data2Vec(tiny_vit()).top_k == 2


def pooled():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0, global_pool="avg"
    )


ERRORS = {
    "nothing left": (lambda: make("MAE", mask="random", mask_ratio=0.99), "`ratio` must leave one of 16 visible"),
    "nothing hidden": (lambda: make("SimMIM", mask="random", mask_ratio=0.0), r"`ratio` must lie in \(0, 1\)"),
    "grid": (lambda: lc.SimMIM(tiny_vit(), mask_unit=3), "`grid` must be a multiple of the squares of 3 x 3"),
    "name": (lambda: make("Data2Vec", mask="blocks"), "`mask` must be one of .* Did you mean 'block'"),
    "own mask": (
        lambda: make("MAE", mask=lambda n, grid, generator: torch.ones(n, 16, dtype=torch.bool)),
        "`mask` must hide some of the 16 patches of every image, and not all",
    ),
    "convnet": (lambda: lc.MAE("resnet18"), "`backbone` must be a vision transformer that can mask its patches"),
    "rope": (lambda: lc.MAE(lc.nn.use_rope(tiny_vit())), "`backbone` must have no rotary positions where patches"),
    "pooling": (lambda: lc.SimMIM(pooled()), "`backbone` must pool its patches without parameters"),
    "width": (lambda: lc.MAE(tiny_vit(), decoder_dim=10), "`decoder_dim` must be a multiple of 4 and of the 16 heads"),
    "depth": (lambda: lc.MAE(tiny_vit(), decoder_depth=0), "`decoder_depth` must be >= 1"),
    "layers": (lambda: lc.Data2Vec(tiny_vit(), top_k=3), "`top_k` must be at most the 2 blocks"),
    "beta": (lambda: lc.Data2Vec(tiny_vit(), top_k=1, beta=-1), "`beta` must be >= 0"),
    "momentum": (lambda: lc.Data2Vec(tiny_vit(), top_k=1, momentum=1.5), r"`momentum` must lie in \[0, 1\]"),
    "size": (
        lambda: run_step(make("MAE"), [[torch.rand(2, 3, 24, 24)]]),
        "`images` must be 16 x 16 pixels for its masks",
    ),
    "numbers": (
        lambda: run_step(make("MAE", mask=unequal), [[torch.rand(2, 3, 16, 16)]]),
        "`mask` must hide as many patches in every image",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_networks_are_refused():
    with pytest.raises(TypeError, match="`backbone` must be a vision transformer that can mask"):
        lc.Data2Vec(TinyBackbone())
