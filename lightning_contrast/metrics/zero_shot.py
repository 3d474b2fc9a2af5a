"""Zero-shot classifiers: class names as texts, compared with images in the space of an image-text method."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_templates, fail, require


@torch.no_grad()
def zero_shot_weights(
    model: Any, class_names: Sequence[str], templates: Sequence[str] = ("{}",), *, batch_size: int = 256
) -> Tensor:
    """Return one unit vector per class: the mean embedding of its name in several sentences.

    As in CLIP (https://arxiv.org/abs/2103.00020, section 3.1.4): the embeddings of a class's sentences have unit length
    before the mean, and so has the mean after it. The logits of images are
    ``model.encode_image(images) @ weights.T``, ``(B, C)``.

    Args:
        model: An image-text method, or any module with ``encode_text(list of str) -> (B, D)``; it runs in eval mode,
            and the mode of every submodule is restored.
        class_names: C different names, none of them empty.
        templates: Sentences with ``{}`` for the name, such as "a drawing of {}".
        batch_size: Texts per forward pass, >= 1.

    Returns:
        ``(C, D)``, float32, on the device of the model's output.

    Raises:
        TypeError: If ``model`` has no ``encode_text``, or a name or template is not a string.
        ValueError: If names repeat or are empty, there are fewer than 2, or a template has no ``{}``.
    """
    encode_text = getattr(model, "encode_text", None)
    if not callable(encode_text):
        hint = "Give an image-text method such as `CLIP`"
        fail("model", "have a method `encode_text`", type(model).__name__, hint, TypeError)
    names, sentences = check_class_names(class_names), check_templates(templates)
    check_at_least("batch_size", batch_size, 1)
    texts = [sentence.replace("{}", name) for name in names for sentence in sentences]
    with eval_mode(model):
        parts = [encode_text(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    embeddings = F.normalize(torch.cat(parts).float(), dim=1).view(len(names), len(sentences), -1)
    return F.normalize(embeddings.mean(1), dim=1)


def check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes as a tuple, after checking that they are different words.

    Args:
        class_names: At least 2 names.

    Raises:
        TypeError: If they are not strings.
        ValueError: If one is empty, two are equal, or there are fewer than 2.
    """
    hint = "Give one name per class, in the order of the labels"
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        fail("class_names", "be a list of strings", class_names, hint, TypeError)
    names = tuple(class_names)
    require(len(names) >= 2, "class_names", "hold at least 2 names", list(names), hint)
    require(all(name.strip() for name in names), "class_names", "hold no empty name", list(names), hint)
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "class_names", "be different, so that a text means one class", twice, hint)
    return names


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore the mode of every submodule afterwards.

    Args:
        model: Any module.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
