"""The towers and tokenizers of open_clip's models."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_contrast._checks import check_captions, check_choice, require
from lightning_contrast.nn.byte_tokenizer import CutTexts

OPEN_CLIP = "open_clip:"


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
        name: The name of the open_clip model; None for a function.
        context_length: As given.
        vocab_size: Number of token ids.
        cut: Number of texts that were cut so far.

    Raises:
        ModuleNotFoundError: If open_clip, or what the tokenizer needs, is not installed.
        ValueError: If open_clip has no model of this name.
    """

    def __init__(self, tokenizer: str | Callable[..., Tensor], context_length: int | None = None) -> None:
        self.name = tokenizer if isinstance(tokenizer, str) else None
        self.context_length = context_length
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


class OpenClipTowers(nn.Module):
    """The parts of an open_clip model that an image-text method is built around.

    Its weights are drawn as open_clip draws them, unless ``pretrained`` is given.

    Args:
        name: Name of an open_clip configuration.
        pretrained: A file of weights, open_clip's tag of some, or None.

    Attributes:
        name: The name.
        image: Image tower without its projection matrix: images (B, C, H, W) to features (B, F).
        image_projection: The matrix, a linear layer from F to D; an identity if the tower has another projection or
            none.
        text: Text tower: tokens (B, L) to embeddings (B, D), with the projection.
        embedding_dim: D.
        context_length: L.
        scalars: "logit_scale", and "logit_bias" if the model has a bias, as floats.

    Raises:
        ModuleNotFoundError: If open_clip is not installed.
        ValueError: If open_clip has no model of this name.
    """

    def __init__(self, name: str, pretrained: str | None = None) -> None:
        super().__init__()
        open_clip = import_open_clip()
        _check_name("name", name, open_clip)
        model: Any = open_clip.create_model(name, pretrained=pretrained, force_custom_text=True)
        self.name = name
        self.embedding_dim: int = open_clip.get_model_config(name)["embed_dim"]
        self.context_length: int = model.context_length
        self.scalars = {"logit_scale": float(model.logit_scale.detach().exp())}
        if model.logit_bias is not None:
            self.scalars["logit_bias"] = float(model.logit_bias.detach())
        self.image, self.text = model.visual, model.text
        self.image_projection: nn.Module = nn.Identity()
        weight = getattr(self.image, "proj", None)
        width = self.embedding_dim
        if isinstance(weight, nn.Parameter):
            width = len(weight)
            self.image.proj = None
            self.image_projection = nn.Linear(width, self.embedding_dim, bias=False, device="meta")
            self.image_projection.weight = nn.Parameter(weight.detach().T.contiguous())
        self.image.num_features, self.text.num_features = width, self.embedding_dim


def check_open_clip(towers: OpenClipTowers, has_bias: bool, **given: object) -> None:
    """Check that a method can take the towers of an open_clip model.

    Args:
        towers: The towers.
        has_bias: Whether the method has a bias of its logits.
        **given: Arguments that the towers stand for, which must be None.
    """
    biased = "logit_bias" in towers.scalars
    require(has_bias or not biased, "name", "be a model without `logit_bias`", towers.name, "Use `SigLIP` for it")
    for argument, value in given.items():
        hint = "The model has its own text tower"
        require(value is None, argument, "be None with the towers of open_clip", type(value).__name__, hint)


def find_open_clip(backbone: object) -> OpenClipTowers | None:
    """Return the towers that an argument is, or names as "open_clip:NAME"; None for any other backbone."""
    if isinstance(backbone, str) and backbone.startswith(OPEN_CLIP):
        return OpenClipTowers(backbone.removeprefix(OPEN_CLIP))
    return backbone if isinstance(backbone, OpenClipTowers) else None
