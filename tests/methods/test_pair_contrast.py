"""PairContrast: layouts of a batch, losses by name, the momentum encoder, and refused arguments."""

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.losses.pair_losses import PAIR_LOSSES
from tests.methods.cases import TinyBackbone
from tests.methods.test_contract import assert_equal_states, gradients, run_step, state
from tests.tolerances import CANCELLING, FORMULA, assert_same_bits, f32, f64

SMALL = {"hidden_dim": 16, "projection_dim": 8}


def model(*encoders, **kwargs):
    torch.manual_seed(0)
    return lc.PairContrast(*(encoders or (TinyBackbone(),)), **(SMALL | kwargs))


def items(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, 16, 16, generator=generator) for _ in range(2)]


class Vectors(nn.Module):
    """Maps vectors (B, 5) to features (B, 8)."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 8)

    def forward(self, vectors):
        return self.layer(vectors)


def test_every_layout_of_a_batch_gives_the_same_loss():
    a, b = items()
    labels, index = torch.arange(6) % 2, torch.arange(6)
    layouts = [(a, b), [a, b], ([a, b], labels), ([a, b], labels, index), {"image": [a, b], "label": labels}]
    found = [run_step(model(), batch)["loss"] for batch in layouts]
    found.append(run_step(model(keys=("left", "right")), {"left": a, "right": b, "label": labels})["loss"])
    for loss in found[1:]:
        assert_same_bits(loss, found[0])


def test_items_of_different_shape_with_an_encoder_each():
    images, vectors = items()[0], torch.rand(6, 5)
    module = model(TinyBackbone(), Vectors())
    run_step(module, (images, vectors))["loss"].backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    for rows in (module.encode_a(images), module.encode_b(vectors)):
        assert rows.shape == (6, 8)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6), **f32(FORMULA))


@pytest.mark.parametrize("name", [name for name, kind in PAIR_LOSSES.items() if not kind.predictor])
def test_the_loss_is_that_of_its_name(name):
    a, b = items()
    module = model(loss=name)
    z_a, z_b = module.projector(module.backbone(a)), module.projector(module.backbone(b))
    expected = {
        "info_nce": lambda: losses.clip_loss(z_a, z_b, logit_scale=1 / 0.07),
        "nt_xent": lambda: losses.nt_xent(z_a, z_b, temperature=0.1),
        "siglip": lambda: losses.siglip_loss(z_a, z_b, logit_scale=10.0, logit_bias=-10.0),
        "barlow_twins": lambda: losses.barlow_twins_loss(z_a, z_b, off_diagonal_weight=0.0051),
        "vicreg": lambda: losses.vicreg_loss(z_a, z_b),
        "spectral": lambda: losses.spectral_contrastive_loss(z_a, z_b, mu=1.0),
        "bilinear": lambda: losses.bilinear_loss(z_a, z_b, module.bilinear.weight),
    }[name]()
    torch.testing.assert_close(run_step(module, (a, b))["loss"], expected, **f32(FORMULA))


def test_options_of_a_loss_reach_it():
    a, b = items()
    plain, changed = (
        run_step(model(loss="vicreg", loss_options=options), (a, b))["loss"]
        for options in (None, {"variance_weight": 0.0})
    )
    assert changed < plain


def test_byol_averages_both_directions_against_networks_that_get_no_gradient():
    a, b = items()
    module = model(TinyBackbone(), TinyBackbone(), loss="byol", momentum=0.9, head_norm=None)
    with torch.no_grad():
        target_a = module.momentum_projector(module.momentum_backbone(a))
        target_b = module.momentum_projector_b(module.momentum_backbone_b(b))
    prediction_a = module.predictor(module.projector(module.backbone(a)))
    prediction_b = module.predictor_b(module.projector_b(module.backbone_b(b)))
    expected = (losses.byol_loss(prediction_a, target_b) + losses.byol_loss(prediction_b, target_a)) / 2
    loss = run_step(module, (a, b))["loss"]
    torch.testing.assert_close(loss, expected, **f32(FORMULA))
    loss.backward()
    frozen = [target for _, target in module.momentum_pairs()]
    assert len(frozen) == 4
    assert all(p.grad is None and not p.requires_grad for target in frozen for p in target.parameters())


def test_curl_compares_queries_with_keys_of_its_momentum_encoder_only():
    a, b = items()
    module = model(loss="bilinear", momentum=0.95, symmetric=False, projection_dim=None)
    ((online, momentum),) = module.momentum_pairs()
    assert_equal_states(state(online), state(momentum))
    for parameter in momentum.parameters():
        parameter.data.mul_(0.5)
    expected = losses.bilinear_loss(module.backbone(a), momentum(b), module.bilinear.weight)
    torch.testing.assert_close(run_step(module, (a, b))["loss"], expected, **f32(FORMULA))
    assert module.bilinear.weight.min() >= 0
    assert module.bilinear.weight.max() < 1


def test_pairs_of_one_group_are_not_negatives():
    twice = [torch.cat([item, item]) for item in items()]
    module, index = model(mask_same="index", head_norm=None), torch.arange(6).repeat(2)
    logits = module.encode_a(twice[0]) @ module.encode_b(twice[1]).T / 0.07
    own = torch.arange(12)
    twin = (index[:, None] == index) & (own[:, None] != own)
    logits = logits.masked_fill(twin, -torch.inf)
    cross_entropy = nn.functional.cross_entropy
    expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    loss = run_step(module, (twice, torch.zeros(12, dtype=torch.long), index))["loss"]
    torch.testing.assert_close(loss, expected, **f32(FORMULA))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"loss": "infonce"}, "`loss` must be one of .*Did you mean 'info_nce'"),
        ({"loss": "byol"}, "`momentum` must be a number for 'byol'"),
        ({"momentum": 1.5}, "`momentum` must lie in"),
        ({"loss": "vicreg", "temperature": 0.1}, "`temperature` must be None for 'vicreg'"),
        ({"loss": "byol", "momentum": 0.9, "mask_same": "index"}, "`mask_same` must be None for 'byol'.*'siglip'"),
        ({"loss": "vicerg"}, "Did you mean 'vicreg'"),
        ({"symmetric": False}, "`symmetric` must be True without `momentum` or with `encoder_b`"),
        ({"encoder_b": TinyBackbone(), "momentum": 0.9, "symmetric": False}, "`symmetric` must be True"),
        ({"loss": "vicreg", "loss_options": {"variance": 1.0}}, "`loss_options` must be one of .*'variance_weight'"),
        ({"keys": ("image", "image")}, "`keys` must be two different keys"),
    ],
)
def test_refused_arguments(settings, text):
    with pytest.raises(ValueError, match=text):
        model(**settings)


def test_encoders_without_heads_need_one_width():
    encoder = Vectors()
    encoder.num_features = 7
    with pytest.raises(ValueError, match="`encoder_b` must have 8 features, as encoder_a, got 7"):
        model(TinyBackbone(), encoder, projection_dim=None)


A, B = items()


@pytest.mark.parametrize(
    ("keys", "batch", "error", "text"),
    [
        (("image", "depth"), {"image": A}, ValueError, "`batch` must hold 'image' and 'depth', got \"no 'depth'\""),
        (("image", "depth"), {"image": A, "depth": None}, ValueError, "no 'depth'"),
        (("image", "depth"), (A, B), TypeError, "`batch` must be a dict with 'image' and 'depth'"),
        (None, A, ValueError, "hold two items"),
        (None, ([A], torch.arange(6)), ValueError, "hold two items"),
        (None, ([A, B, A], torch.arange(6)), ValueError, "hold two items"),
        (None, (A, torch.arange(6)), ValueError, "hold two items as floating tensors.*int64.*GroupPairs"),
        (None, ((A * 255).byte(), (B * 255).byte()), ValueError, "floating tensors.*uint8"),
        (None, (A, B[:5]), ValueError, r"as many items a as items b, got \(6, 5\)"),
        (None, (A[:1], B[:1]), ValueError, "batch of at least 2"),
    ],
)
def test_a_missing_or_uneven_item_is_named(keys, batch, error, text):
    with pytest.raises(error, match=text):
        run_step(model(keys=keys), batch)


def test_evaluation_takes_items_a_by_their_key():
    module = model(keys=("left", "right")).eval()
    with torch.no_grad():
        features = module.validation_step({"left": A, "right": B}, 0)["features"]
        assert_same_bits(features, module(A))


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_gradient_cache_is_exact_over_both_encoders(chunk):
    module, batch = model(TinyBackbone(), Vectors(), head_norm=None).double(), (A.double(), TWO.double())
    seen = {"backbone": [], "backbone_b": []}
    for name, sizes in seen.items():
        first = next(m for m in getattr(module, name).modules() if isinstance(m, nn.Conv2d | nn.Linear))
        first.register_forward_hook(lambda m, args, out, sizes=sizes: sizes.append(len(args[0])))
    whole = gradients(module, batch)
    assert seen == {"backbone": [6], "backbone_b": [6]}
    module.zero_grad()
    cache = lc.GradientCache(chunk)
    cache.on_fit_start(None, module)
    chunked = gradients(module, batch)
    cache.teardown(None, module, "fit")
    assert {name: max(sizes[1:]) for name, sizes in seen.items()} == {"backbone": chunk, "backbone_b": chunk}
    assert whole.keys() == chunked.keys() == dict(module.named_parameters()).keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, **f64(CANCELLING))


TWO = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
WIDTH = 5


def sensors(count, seed, number=2):
    """Return linear readings (N, 5) with noise of the same hidden vectors (N, 4)."""
    mixing = torch.randn(number, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 4, generator=generator)
    return [hidden @ mix + 0.1 * torch.randn(count, WIDTH, generator=generator) for mix in mixing]


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.slow
def test_every_loss_learns_to_find_the_other_reading_of_a_new_sample(name):
    settings = {"projection_dim": None if name == "bilinear" else 16, "hidden_dim": 32}
    settings |= {"momentum": 0.9} if name == "byol" else {}
    module = model(Vectors(), Vectors(), loss=name, **settings).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)

    def found():
        module.eval()
        with torch.no_grad():
            a, b = sensors(64, seed=1)
            query, key = module.predict(module.project(a, "a"), "a"), module.project(b, "b")
            if name != "bilinear":
                query, key = nn.functional.normalize(query, dim=1), nn.functional.normalize(key, dim=1)
            scores = query @ key.T if name != "bilinear" else query @ module.bilinear() @ key.T
        module.train()
        return (scores.argmax(1) == torch.arange(64)).float().mean().item()

    start = found()
    a, b = sensors(1024, seed=2)
    for step in range(300):
        rows = torch.arange(128) + 128 * (step % 8)
        optimizer.zero_grad()
        run_step(module, (a[rows], b[rows]))["loss"].backward()
        optimizer.step()
        for online, target in module.momentum_pairs():
            lc.nn.ema_update(online, target, 0.9)
    assert start < 0.1  # chance is 1 / 64
    assert found() > (0.15 if name == "bilinear" else 0.4)  # without a normalization long keys win
