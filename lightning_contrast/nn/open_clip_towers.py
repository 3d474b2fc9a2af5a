"""The towers and tokenizers of open_clip's models."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_contrast._checks import check_captions
from lightning_contrast.nn.byte_tokenizer import CutTexts


class OpenClipTokenizer(CutTexts):
    """A tokenizer of open_clip that checks its texts, and warns of those that are cut.

    Args:
        tokenizer: What ``open_clip.get_tokenizer`` returns: a function of a list of B str and ``context_length`` that
            returns int64 tokens (B, L), pads them, and ends a text that is too long with its end token.

    Attributes:
        vocab_size: Number of token ids.
        cut: Number of texts that were cut so far.
    """

    def __init__(self, tokenizer: Callable[..., Tensor]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size: int | None = getattr(tokenizer, "vocab_size", None)

    def __call__(self, texts: list[str]) -> Tensor:
        """Return int64 tokens (B, L) of B texts, L the context length of the model.

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
        ModuleNotFoundError: If open_clip, or what the model's tokenizer needs, is not installed.
    """
    try:
        import open_clip  # type: ignore[import-untyped]
    except ImportError as error:
        hint = "pip install 'lightning_contrast[clip]'"
        raise ModuleNotFoundError(f"`from_open_clip` needs open_clip_torch: {hint}.") from error
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
        try:
            parts["tokenizer"] = OpenClipTokenizer(open_clip.get_tokenizer(name))
        except ImportError as error:
            hint = "Install the package, or give `tokenizer`"
            raise ModuleNotFoundError(f"The tokenizer of {name} cannot be imported: {error}. {hint}.") from error
    return parts | dict(arguments), weight
