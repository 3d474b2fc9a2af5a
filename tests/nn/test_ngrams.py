"""Words and n-grams as tokens, and the tower that averages them."""

import zlib

import pytest
import torch
import torch.nn.functional as F

from lightning_contrast.nn import NGramTokenizer, NGramTower


def test_tokens_are_the_words_and_the_ngrams_of_each_word():
    parts = ["word a", "<a>", "word cat", "<ca", "cat", "at>", "<cat", "cat>"]
    expected = [1 + zlib.crc32(part.encode()) % 999 for part in parts]
    tokens = NGramTokenizer(1000, sizes=(3, 4))(["A  Cat", "a"])
    assert sorted(tokens[0].tolist()) == sorted(expected)
    assert tokens[1].tolist() == [*expected[:2], *[0] * 6]
    assert tokens.dtype == torch.int64


def test_order_of_the_words_and_padding_do_not_matter():
    tokenizer, tower = NGramTokenizer(), NGramTower(width=8).eval()
    one = tower(tokenizer(["cat left of dog"]))
    other = tower(tokenizer(["dog of left cat", "a much longer text than that"]))
    torch.testing.assert_close(one[0], other[0])
    assert (one[0] - other[1]).abs().max() > 0.01


def test_the_tower_equals_its_formula():
    tower = NGramTower(30, 4, dropout=0.0)
    tokens = torch.tensor([[3, 7, 7, 0]])
    vectors = tower.embedding.weight
    mean = F.layer_norm((vectors[3] + 2 * vectors[7]) / 3**0.5, (4,))
    torch.testing.assert_close(tower(tokens)[0], mean + tower.mlp(mean))


def test_dropout_leaves_tokens_out_in_training_only():
    tower = NGramTower(30, 4, dropout=0.5)
    tokens = torch.arange(1, 20)[None]
    torch.manual_seed(0)
    assert not torch.equal(tower(tokens), tower(tokens))
    tower.eval()
    assert torch.equal(tower(tokens), tower(tokens))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`vocab_size` must be >= 2"):
        NGramTokenizer(1)
    with pytest.raises(ValueError, match="`sizes` must be >= 1"):
        NGramTokenizer(sizes=(0,))
    with pytest.raises(ValueError, match="`texts` must not be empty"):
        NGramTokenizer()(["cat", " "])
    with pytest.raises(TypeError, match="`texts` must be a list of str"):
        NGramTokenizer()("cat")
    with pytest.raises(ValueError, match="`dropout` must be < 1"):
        NGramTower(dropout=1.0)
