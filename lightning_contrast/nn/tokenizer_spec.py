"""Tokenizers as plain values, from which a file that holds a text tower builds them again."""

from collections.abc import Mapping
from typing import Any

from lightning_contrast._checks import check_choice, fail
from lightning_contrast.nn.byte_tokenizer import ByteTokenizer, Tokenizer
from lightning_contrast.nn.ngrams import NGramTokenizer
from lightning_contrast.nn.open_clip_towers import OpenClipTokenizer

_KINDS = ("bytes", "ngrams", "open_clip")


def tokenizer_spec(tokenizer: object) -> dict[str, Any] | None:
    """Return plain values for `build_tokenizer`, or None for a tokenizer that is not of this package.

    Args:
        tokenizer: A `ByteTokenizer`, an `NGramTokenizer`, an `OpenClipTokenizer` of a name, or any other function.
    """
    if type(tokenizer) is ByteTokenizer:
        return {"kind": "bytes", "context_length": tokenizer.context_length, "lower": tokenizer.lower}
    if type(tokenizer) is NGramTokenizer:
        return {"kind": "ngrams", "vocab_size": tokenizer.vocab_size, "sizes": list(tokenizer.sizes)}
    if type(tokenizer) is OpenClipTokenizer and tokenizer.name is not None:
        return {"kind": "open_clip", "name": tokenizer.name, "context_length": tokenizer.context_length}
    return None


def build_tokenizer(spec: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a `tokenizer_spec`.

    Args:
        spec: "kind" and the arguments of the tokenizer.

    Raises:
        ValueError: If the kind is unknown or an argument is missing or out of its range.
        ModuleNotFoundError: If the tokenizer is open_clip's and the extra is not installed.
    """
    check_choice("kind", spec.get("kind"), _KINDS)
    try:
        if spec["kind"] == "bytes":
            return ByteTokenizer(spec["context_length"], lower=spec["lower"])
        if spec["kind"] == "ngrams":
            return NGramTokenizer(spec["vocab_size"], tuple(spec["sizes"]))
        return OpenClipTokenizer(spec["name"], spec["context_length"])
    except KeyError as error:
        fail("tokenizer", f"have the entry {error}", dict(spec), "Export the model again")
