"""Argument checks with messages of the form `` `name` must <rule>, got <value>. <hint>. ``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, SupportsFloat

from torch import Tensor


def fail(name: str, rule: str, value: object, hint: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` with the message `` `name` must <rule>, got <value>. <hint>. ``.

    Args:
        name: Name of the argument.
        rule: The words after "must".
        value: The value given.
        hint: How to fix it: a sentence without its full stop.
        error: ValueError for values and shapes, TypeError for objects.
    """
    raise error(f"`{name}` must {rule}, got {value!r}. {hint}.")


def require(condition: bool, name: str, rule: str, value: object, hint: str) -> None:
    """Raise a ValueError unless ``condition`` holds."""
    if not condition:
        fail(name, rule, value, hint)


def check_number(name: str, value: object, hint: str = "Give an int or a float") -> None:
    """Check that ``value`` is a number, not a bool, a str, None or a sequence."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        fail(name, "be a number", value, hint, TypeError)


def check_positive(name: str, value: float, hint: str = "Give a number above 0") -> None:
    """Check ``value > 0``, and that it is finite."""
    check_number(name, value, hint)
    require(value > 0, name, "be > 0", value, hint)
    require(value < math.inf, name, "be finite", value, hint)


def check_not_negative(name: str, value: float, hint: str = "Give 0 or a number above it") -> None:
    """Check ``value >= 0``, and that it is finite."""
    check_number(name, value, hint)
    require(value >= 0, name, "be >= 0", value, hint)
    require(value < math.inf, name, "be finite", value, hint)


def check_weights(**weights: float) -> None:
    """Check that the weights of a sum of losses are >= 0, and that one of them is above 0."""
    for name, weight in weights.items():
        check_not_negative(name, weight)
    hint = "Set at least one of them above 0"
    require(any(weights.values()), next(iter(weights)), "be > 0 if the other weights are 0", 0, hint)


def check_at_least(name: str, value: int, minimum: int, hint: str | None = None) -> None:
    """Check that ``value`` is an int of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        fail(name, "be a whole number", value, hint or f"Give an int of at least {minimum}", TypeError)
    require(value >= minimum, name, f"be >= {minimum}", value, hint or f"Give at least {minimum}")


def check_probability(name: str, value: float, hint: str = "Give a number from 0 to 1") -> None:
    """Check ``0 <= value <= 1``."""
    check_interval(name, value, "[0, 1]", hint)


def check_interval(name: str, value: float, interval: str, hint: str) -> None:
    """Check that a number lies in an interval, whose ends belong to it or not, such as ``"(0, 1]"``."""
    check_number(name, value, hint)
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    require(above and below, name, f"lie in {interval}", value, hint)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Check that ``value`` is one of ``choices``; the message names near matches."""
    options = list(choices)
    if value in options:
        return
    hint = near_names(value, options) or "Choose one of those"
    fail(name, f"be one of {', '.join(map(repr, options))}", value, hint)


def near_names(value: object, options: Iterable[object]) -> str:
    """Return a hint that names the options that are similar to ``value``, empty if none is."""
    near = get_close_matches(str(value), [str(option) for option in options], n=3)
    return f"Did you mean {' or '.join(map(repr, near))}" if near else ""


def check_dict(name: str, value: object, hint: str = "Give a dict of arguments") -> dict[str, Any]:
    """Return a mapping from words as a dict, an empty one for None, after checking that it is one."""
    given = {} if value is None else value
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        fail(name, "be a dict with words as keys", value, hint, TypeError)
    return dict(given)


def check_word(name: str, value: object, hint: str = "It is the prefix of the log keys") -> None:
    """Check that ``value`` is a non-empty str."""
    require(isinstance(value, str) and value != "", name, "be a word", value, hint)


def check_same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor, dims: int) -> None:
    """Check that two tensors have the same shape, of ``dims`` dimensions."""
    if a.shape != b.shape or a.ndim != dims:
        raise ValueError(
            f"`{name_a}` and `{name_b}` must have the same {dims}-D shape, got {tuple(a.shape)} and {tuple(b.shape)}. "
            f"Give one row of each per image."
        )


def check_batch(name: str, size: int, minimum: int = 2) -> None:
    """Check the number of rows in a batch."""
    hint = "Raise `batch_size`, or set `drop_last=True` to drop a short last batch"
    require(size >= minimum, name, f"have a batch of at least {minimum}", size, hint)


def check_numbers(name: str, values: object, hint: str) -> tuple[float, ...]:
    """Return the numbers of a sequence after checking that it is one."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        fail(name, "be a sequence of numbers", values, hint, TypeError)
    numbers = tuple(values)
    for number in numbers:
        check_number(name, number, hint)
    return numbers


def check_range(name: str, values: Sequence[float], low: float, high: float) -> None:
    """Check that ``values`` is an ordered pair inside ``[low, high]``."""
    rule, hint = f"be an ordered pair inside [{low}, {high}]", "Give (smaller, larger)"
    pair = check_numbers(name, values, hint)
    require(len(pair) == 2 and low <= pair[0] <= pair[1] <= high, name, rule, pair, hint)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Return sentences as a tuple, after checking that there is one and that each has ``{}`` once, for the words."""
    hint = 'Give sentences such as "a drawing of {}"'
    if isinstance(templates, str) or not all(isinstance(sentence, str) for sentence in templates):
        fail("templates", "be a list of strings", templates, hint, TypeError)
    require(len(templates) > 0, "templates", "hold at least one sentence", list(templates), hint)
    for sentence in templates:
        require(sentence.count("{}") == 1, "templates", "have {} once in each sentence", sentence, hint)
    return tuple(templates)


def check_caption(caption: object, place: str) -> str:
    """Return a caption after checking that it is a string with a visible character; ``place`` says where it is."""
    hint = "Give every image a text"
    if not isinstance(caption, str):
        fail(place, "be a string", type(caption).__name__, hint, TypeError)
    require(bool(caption.strip()), place, "not be empty", caption, f"{hint}, or leave the image out")
    return caption


def check_captions(texts: object) -> list[str]:
    """Return the texts of a batch as a list, after checking that they are a list or tuple of captions."""
    hint = "Give one str for each image, or int64 tokens (B, L)"
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        fail("texts", "be a list of str", type(texts).__name__, hint, TypeError)
    other = next((type(text).__name__ for text in texts if not isinstance(text, str)), None)
    if other is not None:
        fail("texts", "be a list of str", f"a list with {other}", hint, TypeError)
    empty = [place for place, text in enumerate(texts) if not text.strip()]
    got = f"empty texts at {empty[:5]}" if texts else "no texts"
    hint = "Drop such pairs from the dataset, or give them a caption"
    require(bool(texts) and not empty, "texts", "not be empty", got, hint)
    return list(texts)
