"""BindModalities: every modality against the anchor only, absent ones, frozen encoders, and refused batches."""

import pytest
import torch

import lightning_contrast as lc
from lightning_contrast import losses
from tests.launch import run_processes
from tests.methods.cases import TinyBackbone
from tests.methods.test_contract import run_step
from tests.methods.test_pair_contrast import Vectors, items
from tests.tolerances import FORMULA, assert_same_bits, f32

SMALL = {"hidden_dim": 16, "projection_dim": 8, "head_norm": None}


def model(anchor="image", **kwargs):
    torch.manual_seed(0)
    encoders = {"image": TinyBackbone(), "depth": TinyBackbone(), "text": Vectors()}
    return lc.BindModalities(encoders, anchor, **(SMALL | kwargs))


IMAGE, DEPTH = items()
TEXT = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
BATCH = {"image": IMAGE, "depth": DEPTH, "text": TEXT}


def test_the_loss_is_the_mean_of_those_with_the_anchor():
    module = model(temperature={"text": 0.2})
    depth, image, text = (module.encode(name, BATCH[name]) for name in ("depth", "image", "text"))
    expected = losses.clip_loss(image, depth, logit_scale=1 / 0.07) + losses.clip_loss(image, text, logit_scale=5.0)
    torch.testing.assert_close(run_step(module, BATCH)["loss"], expected / 2, **f32(FORMULA))


def test_layouts_give_the_same_loss():
    labels = torch.arange(6)
    batches = [BATCH, [IMAGE, DEPTH, TEXT], ([IMAGE, DEPTH, TEXT], labels), BATCH | {"label": labels}]
    found = [run_step(model(), batch)["loss"] for batch in batches]
    for loss in found[1:]:
        assert_same_bits(loss, found[0])


@pytest.mark.parametrize("absent", [{}, {"text": None}])
def test_an_absent_modality_adds_nothing_and_gets_no_gradient(absent):
    module = model()
    batch = {"image": IMAGE, "depth": DEPTH} | absent
    expected = losses.clip_loss(module.encode("image", IMAGE), module.encode("depth", DEPTH), logit_scale=1 / 0.07)
    loss = run_step(module, batch)["loss"]
    torch.testing.assert_close(loss, expected, **f32(FORMULA))
    loss.backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == ("_text" in name), name


def test_frozen_encoders_stay_in_evaluation_mode_and_their_heads_are_trained():
    module = model(frozen=["image"]).train()
    assert not module.backbone.training
    assert module.encoder("depth").training
    run_step(module, BATCH)["loss"].backward()
    assert all(parameter.grad is None for parameter in module.backbone.parameters())
    assert all(parameter.grad is not None for parameter in module.projector_image.parameters())


def test_any_modality_can_be_the_anchor():
    module = model("text")
    assert module.backbone is module.encoder("text")
    assert module(TEXT).shape == (6, 8)
    assert module.validation_step(BATCH, 0)["features"].shape == (6, 8)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"depth": DEPTH, "text": TEXT}, r"`batch` must hold the anchor 'image', got \['depth', 'text'\]"),
        ({"image": IMAGE}, "`batch` must hold a modality besides 'image'"),
        ({"image": IMAGE, "depth": DEPTH[:5]}, r"as many rows of each modality, got \{'image': 6, 'depth': 5\}"),
        ([IMAGE, DEPTH], "hold the modalities image, depth, text, got 2"),
        ({"image": IMAGE[:1], "depth": DEPTH[:1]}, "batch of at least 2"),
    ],
)
def test_refused_batches(batch, text):
    with pytest.raises(ValueError, match=text):
        run_step(model(), batch)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"anchor": "imag"}, "`anchor` must be one of .*Did you mean 'image'"),
        ({"temperature": {"image": 0.1}}, "`temperature` must be one of 'depth', 'text'"),
        ({"temperature": -1.0}, "`temperature` must be > 0"),
        ({"frozen": ["sound"]}, "`frozen` must be one of"),
    ],
)
def test_refused_arguments(settings, text):
    with pytest.raises(ValueError, match=text):
        model(**settings)


def test_refused_encoders():
    with pytest.raises(ValueError, match="at least two modalities"):
        lc.BindModalities({"image": TinyBackbone()})
    with pytest.raises(ValueError, match="identifiers"):
        lc.BindModalities({"image": TinyBackbone(), "a.b": TinyBackbone()})
    with pytest.raises(TypeError, match="dict of encoders"):
        lc.BindModalities([TinyBackbone()])
    encoder = Vectors()
    encoder.num_features = 7
    with pytest.raises(ValueError, match="features of one width"):
        lc.BindModalities({"image": TinyBackbone(), "text": encoder}, projection_dim=None)


def different_modalities(rank):
    batch = dict(BATCH)
    del batch["depth" if rank else "text"]
    try:
        run_step(model(), batch)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.dist
def test_ranks_with_different_modalities_are_refused_instead_of_waiting_for_each_other():
    for text in run_processes(different_modalities, 2):
        assert "`modalities of the batch` must be the same on all ranks, got [3, 5]" in text
