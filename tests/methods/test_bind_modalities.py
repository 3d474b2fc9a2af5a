"""BindModalities: every modality against the anchor only, absent ones, frozen encoders, and refused batches."""

import pytest
import torch

import lightning_contrast as lc
from lightning_contrast import losses
from tests.launch import run_processes
from tests.methods.cases import TinyBackbone
from tests.methods.test_contract import run_step
from tests.methods.test_pair_contrast import Vectors, items, sensors
from tests.tolerances import CANCELLING, FORMULA, assert_same_bits, f32, f64

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


def test_the_list_of_images_holds_the_first_modalities():
    found = []
    for batch in (
        {"color": IMAGE, "depth": DEPTH, "text": TEXT},
        {"image": [IMAGE, DEPTH], "text": TEXT},
        {"image": [IMAGE], "depth": DEPTH, "text": TEXT},
    ):
        torch.manual_seed(0)
        encoders = {"color": TinyBackbone(), "depth": TinyBackbone(), "text": Vectors()}
        found.append(run_step(lc.BindModalities(encoders, "color", **SMALL), batch)["loss"])
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])
    for batch in ({"image": [IMAGE, DEPTH], "depth": DEPTH}, {"image": [IMAGE] * 4}):
        with pytest.raises(ValueError, match="`batch` must hold modalities in 'image' that it does not name"):
            run_step(lc.BindModalities(encoders, "color", **SMALL), batch)


def test_a_tokenizer_turns_texts_into_tokens():
    tokenizer, words = lc.nn.NGramTokenizer(100), ["cat", "dog", "sun", "red cat", "moon", "tree"]
    torch.manual_seed(0)
    encoders = {"image": TinyBackbone(), "text": lc.nn.NGramTower(100, 8, dropout=0.0)}
    module = lc.BindModalities(encoders, tokenizers={"text": tokenizer}, **SMALL)
    given = [run_step(module, {"image": IMAGE, "text": texts})["loss"] for texts in (words, tokenizer(words))]
    assert_same_bits(*given)
    assert_same_bits(module.encode("text", words), module.encode("text", tokenizer(words)))
    with pytest.raises(ValueError, match="must not be empty"):
        module.encode("text", ["cat", ""])


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
    held = {parameter for group in module.parameter_groups() for parameter in group["params"]}
    assert not held & set(module.backbone.parameters())
    run_step(module, BATCH)["loss"].backward()
    assert all(parameter.grad is None for parameter in module.backbone.parameters())
    assert all(parameter.grad is not None for parameter in module.projector_image.parameters())


def test_any_modality_can_be_the_anchor():
    module = model("text")
    assert module.backbone is module.encoder("text")
    assert module(TEXT).shape == (6, 8)
    assert module.validation_step(BATCH, 0)["features"].shape == (6, 8)


@pytest.mark.slow
def test_modalities_that_were_never_paired_find_each_other():
    torch.manual_seed(0)
    names = ("image", "depth", "text")
    module = lc.BindModalities({name: Vectors() for name in names}, hidden_dim=32, projection_dim=16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    new = dict(zip(names, sensors(64, seed=1, number=3), strict=True))

    def found():
        module.eval()
        with torch.no_grad():
            scores = module.encode("depth", new["depth"]) @ module.encode("text", new["text"]).T
        module.train()
        return [(part.argmax(1) == torch.arange(64)).float().mean().item() for part in (scores, scores.T)]

    assert max(found()) < 0.1  # chance is 1 / 64
    known = dict(zip(names, sensors(1024, seed=2, number=3), strict=True))
    for step in range(300):
        rows, other = torch.arange(128) + 128 * (step % 8), names[1 + step % 2]  # no sample has both
        optimizer.zero_grad()
        run_step(module, {name: known[name][rows] for name in ("image", other)})["loss"].backward()
        optimizer.step()
    assert min(found()) > 0.4


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
        ({"tokenizers": {"sound": str.split}}, "`tokenizers` must be one of"),
        ({"tokenizers": {"text": "words"}}, "`tokenizers` must be callable"),
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


def rank_batch(rank, absent=("text",), dtype=torch.float64):
    """Return the rows of a rank, four or two; the second rank lacks modalities."""
    rows = slice(4) if rank == 0 else slice(4, 6)
    batch = {name: items[rows].to(dtype) for name, items in BATCH.items() if rank == 0 or name not in absent}
    return batch | {"index": INDEX[rows]}


INDEX = torch.tensor([0, 0, 1, 2, 3, 3])


def rank_gradients(rank, mask_same, absent):
    module = model(mask_same=mask_same).double()
    loss = run_step(module, rank_batch(rank, absent))["loss"]
    loss.backward()
    for parameter in module.parameters():  # what DDP does, which waits for all gradients
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= 2
    return loss.detach(), {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.dist
@pytest.mark.parametrize("mask_same", [None, "index"])
def test_a_modality_that_one_rank_lacks_gives_the_gradient_of_one_process(mask_same):
    module = model(mask_same=mask_same).double()
    image, depth, text = (module.encode(name, BATCH[name].double()) for name in ("image", "depth", "text"))
    groups = None if mask_same is None else INDEX
    expected = losses.clip_loss(image, depth, logit_scale=1 / module.temperature_depth(), groups=groups)
    groups = None if mask_same is None else INDEX[:4]
    expected = expected + losses.clip_loss(
        image[:4], text[:4], logit_scale=1 / module.temperature_text(), groups=groups
    )
    (expected / 2).backward()
    for loss, grads in run_processes(rank_gradients, 2, mask_same, ("text",)):
        torch.testing.assert_close(loss, expected.detach() / 2, **f64(CANCELLING))
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, **f64(CANCELLING), msg=name)


class Step(torch.nn.Module):
    """A training step as a forward pass, which is what DDP wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, batch):
        return run_step(self.module, batch)["loss"]


def ddp_weights(rank, absent_by_step, find_unused):
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    step = DistributedDataParallel(Step(model()), find_unused_parameters=find_unused)
    optimizer = torch.optim.AdamW(step.parameters(), lr=0.01)
    for absent in absent_by_step:
        batch = rank_batch(rank, absent, torch.float32)
        if len(absent) == 1 and find_unused:
            batch.pop(absent[0], None)  # the first rank lacks it too
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()
    return [weight.detach().clone() for weight in step.parameters()]


@pytest.mark.dist
@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp_trains_on_when_ranks_lack_modalities(find_unused):
    absent = [("text",), ("depth",), ("text", "depth"), ()]
    first, second = run_processes(ddp_weights, 2, absent, find_unused)
    for a, b, start in zip(first, second, model().parameters(), strict=True):
        assert_same_bits(a, b)
        assert not torch.equal(a, start)


def refused_on_ranks(rank, absent, norm):
    module = model(head_norm=norm)
    if norm is not None:
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    try:
        run_step(module, rank_batch(rank, absent, torch.float32))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.dist
@pytest.mark.parametrize(
    ("absent", "norm", "text"),
    [
        (("image",), None, "`batch` must hold the anchor 'image'"),
        (("text",), "batch", "`batch` must hold the same modalities on all ranks, got {'text': [True, False]}"),
    ],
)
def test_all_ranks_refuse_what_one_of_them_would_wait_for(absent, norm, text):
    for error in run_processes(refused_on_ranks, 2, absent, norm):
        assert text in error
