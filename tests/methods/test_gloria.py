"""GLoRIA: the step is its two losses, words are joined of their pieces, regions come from the chosen layer."""

import copy

import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast import losses
from lightning_contrast.nn import ByteTokenizer, RegionMaps
from lightning_contrast.nn.region_maps import byte_words, join_pieces
from tests.methods.cases import WORDS, TinyBackbone
from tests.methods.test_contract import run_step
from tests.tolerances import FORMULA, NETWORK, assert_same_bits, f32

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXTS = ["a cat", "two old dogs", "sun", "left of sun"]
SMALL = WORDS | {"context_length": 16, "region_layer": "layers.3", "optimizer": "sgd", "lr": 0.05}


PADDED = ByteTokenizer(16)(TEXTS) * torch.tensor([[1], [0], [1], [0]])  # two texts of padding only


def model(backbone=None, **kwargs):
    torch.manual_seed(0)
    return lc.GLoRIA(TinyBackbone() if backbone is None else backbone, **(SMALL | kwargs))


def test_words_of_bytes():
    tokens = ByteTokenizer(16)(["a cat", "two  old dogs"])
    assert byte_words(tokens)[0].tolist() == [-1, 0, -1, 1, 1, 1, *[-1] * 9]
    assert byte_words(tokens)[1].tolist() == [-1, 0, 0, 0, -1, -1, 1, 1, 1, -1, 2, 2, 2, 2, -1]


@pytest.mark.parametrize("mean", [False, True])
def test_pieces_are_joined(mean):
    states = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0))
    found = join_pieces(states, torch.tensor([[-1, 0, -1, 1, 1, -1]]), 3, mean=mean)
    assert_same_bits(found[0, :, 0], states[0, 1])
    torch.testing.assert_close(found[0, :, 1], (states[0, 3] + states[0, 4]) / (2 if mean else 1), **f32(FORMULA))
    assert not found[0, :, 2].any()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.0), (0.0, 3.0)])
def test_step_is_the_sum_of_both_losses(weights):
    module = model(local_weight=weights[0], global_weight=weights[1])
    batch = {"image": IMAGES, "text": TEXTS}
    loss = run_step(module, batch)["loss"]
    maps = module.backbone.layers[:4](IMAGES)
    regions = module.region_projection(maps)
    tokens = module.tokenizer(TEXTS)
    states, _ = module.text_backbone.forward_tokens(tokens)
    counts = [len(text.split()) for text in TEXTS]
    words = torch.zeros(4, 8, 3)
    for i, text in enumerate(TEXTS):
        place = 1
        for t, word in enumerate(text.split()):
            words[i, :, t] = states[i, place : place + len(word)].sum(0)
            place += len(word) + 1
    local = losses.gloria_local_loss(regions, words, torch.tensor(counts))
    text = torch.stack([words[i, :, :count].mean(1) for i, count in enumerate(counts)])
    whole = losses.gloria_global_loss(module.image_projection(module.backbone(IMAGES)), text)
    torch.testing.assert_close(loss, weights[0] * local + weights[1] * whole, **f32(NETWORK))
    assert_same_bits(run_step(module, [IMAGES, TEXTS])["loss"], loss)
    assert_same_bits(run_step(module, [IMAGES, tokens])["loss"], loss)


def test_encoders_and_attention():
    module = model().eval()
    for found in (module.encode_image(IMAGES), module.encode_text(TEXTS), module.encode_text(module.tokenizer(TEXTS))):
        assert found.shape == (4, 8)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    attention, ids = module.attention(IMAGES, TEXTS)
    assert attention.shape[0] == 4
    assert attention.shape[2:] == (4, 4)
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(attention.shape[:2]))
    assert (ids.amax(1) + 1).tolist() == [2, 3, 1, 3]
    alone, _ = module.attention(IMAGES[1:2], TEXTS[1:2])  # other texts and padding play no part
    torch.testing.assert_close(alone[0, :3], attention[1, :3], **f32(NETWORK))


class States(nn.Module):
    """A text tower of another kind: an embedding of each token."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 6)

    def forward_tokens(self, tokens):
        return self.embedding(tokens), (tokens > 0).sum(1)


def tokenizer(texts):
    rows = [[1, *(10 + len(word) for word in text.split()), 2] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def test_any_tower_and_any_map():
    maps = nn.Sequential(nn.Conv2d(3, 5, 3, 4), nn.GELU())
    module = model(maps, text_backbone=States(), tokenizer=tokenizer, region_layer=None, feature_dim=5)
    assert module.region_maps.layer == ""
    attention, ids = module.attention(IMAGES, TEXTS)
    assert attention.shape == (4, 4, 4, 4)  # the longest text has three words after the start
    assert ids[1].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]  # with the start, without the end
    out = run_step(module, [IMAGES, TEXTS])
    assert out["features"].shape == (4, 5)
    out["loss"].backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    mine = model(text_backbone=States(), tokenizer=tokenizer, word_ids=lambda tokens: (tokens > 9).long() - 1)
    words, lengths, _ = mine._words(tokenizer(TEXTS))
    assert lengths.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(words[0, :, 0], mine.text_backbone.embedding(torch.tensor([11, 13])).sum(0))


def test_regions_of_a_resnet_are_those_of_its_third_stage():
    module = lc.GLoRIA("resnet18", **(WORDS | {"context_length": 16}))
    assert module.region_maps.layer == "layer3"
    assert module.region_projection.weight.shape == (8, 256, 1, 1)
    assert module.attention(torch.rand(2, 3, 64, 64), TEXTS[:2])[0].shape[2:] == (4, 4)


def test_recorder_keeps_nothing_outside_its_block_and_is_copied_with_the_network():
    module = model()
    module.backbone(IMAGES)
    assert module.region_maps._maps == []
    other = copy.deepcopy(module)
    with other.region_maps.recording():
        other.backbone(IMAGES)
        other.backbone(IMAGES[:1])
    assert module.region_maps._maps == []
    assert other.region_maps.take().shape == (5, 8, 4, 4)
    assert other.region_maps._maps == []


def test_gradient_cache_gives_the_step_of_the_whole_batch(tmp_path):
    def gradients(callbacks):
        module = model().double()
        module.train()
        for callback in callbacks:
            callback.on_fit_start(None, module)
        run_step(module, [IMAGES.double(), TEXTS])["loss"].backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    whole, chunked = gradients([]), gradients([lc.GradientCache(3)])
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"region_layer": "layer9"}, ValueError, "`region_layer` must be the name of a submodule of TinyBackbone"),
        ({"region_layer": "layers.2"}, ValueError, r"`region_dim` must be given, got None.*channels of `layers\.2`"),
        ({"text_backbone": nn.Linear(2, 2)}, TypeError, "`text_backbone` must have a method `forward_tokens`"),
        ({"tokenizer": tokenizer}, ValueError, "`tokenizer` must have a `vocab_size`"),
        ({"pieces": "max"}, ValueError, "`pieces` must be one of 'sum', 'mean'"),
        (
            {"local_weight": 0.0, "global_weight": 0.0},
            ValueError,
            "`local_weight` must be > 0 if the other",
        ),
        ({"global_weight": -1.0}, ValueError, "`global_weight` must be >= 0"),
        ({"word_scale": 0.0}, ValueError, "`word_scale` must be > 0"),
        ({"mask_same": "text"}, ValueError, "`mask_same` must be one of"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        model(**kwargs)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([IMAGES, TEXTS[:3]], ValueError, "`texts` must be 4, one for each image, got 3"),
        ([IMAGES, ["a", "b", " ", "c"]], ValueError, "`texts` must not be empty"),
        ([IMAGES, torch.arange(4)], ValueError, "`batch` must hold texts for GLoRIA"),
        ({"image": IMAGES}, ValueError, "`batch` must hold texts for GLoRIA"),
        ([IMAGES, PADDED], ValueError, r"`texts` must hold a word each, got 'none at \[1, 3\]'"),
        ({"image": IMAGES, "text": [1, 2, 3, 4]}, TypeError, "`texts` must be a list of str"),
    ],
)
def test_bad_batches(batch, error, message):
    with pytest.raises(error, match=message):
        run_step(model(), batch)


def test_on_an_accelerator_padding_alone_is_a_word_of_zeros(monkeypatch):
    module = model()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # then nothing is read on the host either
    words, counts, _ = module._words(PADDED)
    assert counts.tolist() == [2, 1, 1, 1]
    assert not words[1].any()
    assert words[0, :, :2].abs().amin(0).gt(0).all()
    loss = run_step(module, [IMAGES, PADDED])["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_long_captions_are_cut_with_a_warning():
    module = model()
    with pytest.warns(UserWarning, match=r"1 of 4 texts are longer than 16 tokens and were cut"):
        run_step(module, [IMAGES, [*TEXTS[:3], "a very long caption of a sun"]])


def test_a_layer_without_a_map_is_refused():
    flat = model(region_layer="layers.6", region_dim=8)
    with pytest.raises(ValueError, match=r"must return a map \(B, C, H, W\) from layers.6, got \(4, 8\)"):
        run_step(flat, [IMAGES, TEXTS])
    unused = TinyBackbone()
    unused.extra = nn.Conv2d(1, 8, 1)
    with pytest.raises(ValueError, match="`region_layer` must run in the backbone's forward pass, got 'extra'"):
        run_step(model(unused, region_layer="extra"), [IMAGES, TEXTS])
    assert RegionMaps(TinyBackbone(), "layers").num_channels == 8
