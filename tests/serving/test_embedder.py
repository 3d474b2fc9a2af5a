"""What embedders are given and how they run: modules in threads, tokenizers, pixels."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.serving import Embedder, open_embedder
from tests.served_models import SPEC, image_model, network, picture, towers
from tests.tolerances import NETWORK, assert_same_bits, f32


class TwoTowers(nn.Module):
    """A module in train mode whose outputs in that mode are those of a batch, of images and of texts."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)
        self.input_spec = {"size": 2, "mean": None, "std": None}

    def encode_image(self, images):
        return self.norm(images.flatten(1))

    def encode_text(self, texts):
        return self.norm(torch.tensor([[float(len(text))] * 12 for text in texts]))


def test_threads_share_a_module_in_train_mode():
    module = TwoTowers().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    embedder = open_embedder(module)
    images = torch.rand(8, 3, 2, 2)
    wanted = embedder.embed_prepared(list(images)), embedder.embed_texts(["a", "bb"])

    def ask(number):
        found = embedder.embed_texts(["a", "bb"]) if number % 2 else embedder.embed_prepared(list(images))
        return np.abs(found - wanted[number % 2]).max()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(400))) == {0}
    assert module.training
    assert module.norm.training
    for name, value in module.state_dict().items():
        assert_same_bits(value, before[name])


def spaces(texts):
    """Return tokens (B, 40) that know nothing but the lengths."""
    return torch.tensor([[len(text)] * 40 for text in texts])


@pytest.mark.slow
def test_the_digest_tells_tokenizers_apart():
    folder, model = towers()
    saved = open_embedder(folder)
    same = open_embedder(folder, tokenizer=lc.nn.ByteTokenizer(40))
    assert model.tokenizer.context_length == 40
    others = [open_embedder(folder, tokenizer=found) for found in (spaces, lc.nn.ByteTokenizer(40, lower=False))]
    assert same.model_digest == saved.model_digest
    assert len({found.model_digest for found in (saved, *others)}) == 3


def test_a_tokenizer_without_a_use_is_refused(tmp_path):
    file = lc.export.export(network(), tmp_path / "net.pt", input_spec=SPEC)
    for model in (network(), file, image_model(), open_embedder(image_model())):
        with pytest.raises(ValueError, match=r"`tokenizer` must be None"):
            open_embedder(model, tokenizer=spaces)


def test_pixels_are_resized_by_the_interpolation_of_the_spec():
    spec = SPEC | {"interpolation": "bicubic"}
    given = torch.from_numpy(np.array(picture(3))).permute(2, 0, 1)
    embedder = Embedder(lambda images: images.flatten(1).float().numpy(), spec, model_digest="0", takes_pixels=True)
    policy = lc.augment.ViewPolicy.from_input_spec(
        {"size": SPEC["size"], "mean": None, "std": None}, interpolation="bicubic"
    )
    wanted = (policy.eval_transform(given[None]) * 255).round().flatten(1)
    torch.testing.assert_close(torch.from_numpy(embedder.embed_images([given])), wanted, **f32(NETWORK))
