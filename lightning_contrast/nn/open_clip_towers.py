"""The towers and tokenizers of open_clip's models."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_contrast._checks import check_captions, check_choice
from lightning_contrast.nn.byte_tokenizer import CutTexts


def import_open_clip() -> Any:
    """Return the module open_clip.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        import open_clip  # type: ignore[import-untyped]
    except ImportError as error:
        hint = "pip install 'lightning_contrast[clip]'"
        raise ModuleNotFoundError(f"Models and tokenizers of open_clip need open_clip_torch: {hint}.") from error
    return open_clip


class OpenClipTokenizer(CutTexts):
    """A tokenizer of open_clip that checks its texts, and warns of those that are cut.

    Args:
        tokenizer: Name of an open_clip model whose tokenizer it is; or a function of a list of B str and
            ``context_length`` that returns int64 tokens (B, L), pads them, and ends a text that is too long with its
            end token.
        context_length: L, the number of tokens of each text, for the tokenizer of a name; None is that of the model.

    Attributes:
        vocab_size: Number of token ids.
        cut: Number of texts that were cut so far.

    Raises:
        ModuleNotFoundError: If open_clip, or what the tokenizer needs, is not installed.
        ValueError: If open_clip has no model of this name.
    """

    def __init__(self, tokenizer: str | Callable[..., Tensor], context_length: int | None = None) -> None:
        self.tokenizer = _named_tokenizer(tokenizer, context_length) if isinstance(tokenizer, str) else tokenizer
        self.vocab_size: int | None = getattr(self.tokenizer, "vocab_size", None)

    def __call__(self, texts: list[str]) -> Tensor:
        """Return int64 tokens (B, L) of B texts.

        Raises:
            TypeError: If ``texts`` is not a list of str.
            ValueError: If a text is empty.
        """
        tokens = self.tokenizer(check_captions(texts))
        full = tokens[:, -1] != 0  # the others end with padding
        rows = full.nonzero().flatten().tolist()
        if rows:  # one more token changes those that were cut: their end token moves
            longer = self.tokenizer([texts[row] for row in rows], context_length=tokens.shape[1] + 1)
            cut = (longer[:, :-1] != tokens[rows]).any(1)
            self.count_cut(int(cut.sum()), len(texts), tokens.shape[1])
        return tokens


def _named_tokenizer(name: str, context_length: int | None) -> Callable[..., Tensor]:
    """Return the tokenizer of an open_clip model."""
    open_clip = import_open_clip()
    _check_name("tokenizer", name, open_clip)
    try:
        return open_clip.get_tokenizer(name, context_length=context_length)  # type: ignore[no-any-return]
    except ImportError as error:
        hint = "Install the package, or give another tokenizer"
        raise ModuleNotFoundError(f"The tokenizer of {name} cannot be imported: {error}. {hint}.") from error


def _check_name(argument: str, name: str, open_clip: Any) -> None:
    """Check that open_clip has a model; it gives any other name its own default tokenizer."""
    if ":" not in name:  # that of a model elsewhere, such as hf-hub:...
        check_choice(argument, name, open_clip.list_models())


def open_clip_parts(
    name: str, pretrained: str | None, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], Tensor | None]:
    """Build a model of open_clip; return its parts as arguments of an image-text method, and the image projection.

    The projection matrix is taken out of the image tower.

    Args:
        name: Name of an open_clip configuration.
        pretrained: A file of weights, open_clip's tag of some, or None.
        arguments: Arguments of the method, which replace the parts.

    Returns:
        The arguments, and the projection (F, D), or None if the tower has none, or another one than a matrix.

    Raises:
        ModuleNotFoundError: If open_clip is not installed.
        ValueError: If open_clip has no model of this name.
    """
    open_clip = import_open_clip()
    _check_name("name", name, open_clip)
    model: Any = open_clip.create_model(name, pretrained=pretrained, force_custom_text=True)
    embedding_dim: int = open_clip.get_model_config(name)["embed_dim"]
    model.text.num_features = embedding_dim
    visual, weight = model.visual, getattr(model.visual, "proj", None)
    if isinstance(weight, nn.Parameter):
        visual.proj = None
    else:
        weight = None
    parts = {"backbone": visual, "text_backbone": model.text, "embedding_dim": embedding_dim}
    parts["feature_dim"] = embedding_dim if weight is None else len(weight)
    parts["logit_scale"] = float(model.logit_scale.detach().exp())
    if model.logit_bias is not None:
        parts["logit_bias"] = float(model.logit_bias.detach())
    if "tokenizer" not in arguments:
        parts |= {"tokenizer": name, "context_length": model.context_length}
    return parts | dict(arguments), weight
