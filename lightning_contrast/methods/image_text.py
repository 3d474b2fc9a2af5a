"""Base class of the methods that contrast images with texts: towers, projections, texts, and open_clip's models."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast import optim
from lightning_contrast._checks import check_at_least, check_captions, check_choice, check_dict, fail, require
from lightning_contrast.augment import image_text_views
from lightning_contrast.contracts import batch_texts
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, sample_ids
from lightning_contrast.nn import ByteTokenizer, LogitScale, TextTransformer, read_feature_dim
from lightning_contrast.nn.byte_tokenizer import Tokenizer
from lightning_contrast.nn.open_clip_towers import (
    OPEN_CLIP,
    OpenClipTokenizer,
    OpenClipTowers,
    check_open_clip,
    find_open_clip,
)
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import unit_rows
from lightning_contrast.runtime.frozen_parts import FrozenParts
from lightning_contrast.runtime.fsdp import strategy_module
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.seeding import send

_SMALL = {"width": 128, "layers": 3, "heads": 2}  # 64 channels per head, as published


class ImageTextModule(FrozenParts, SelfSupervisedModule):
    """Two towers, their projections to a common space, and the learned scale of their similarities.

    A batch holds images (B, C, H, W) and texts: ``(images, texts)``, or a dict with "image" and "text". Texts are a
    list of str, or int64 tokens (B, L). `forward` gives the image tower's features (B, F); `encode_image` and
    `encode_text` give the embeddings (B, D).

    Args:
        backbone: Image tower: name of a timm model, or a module that maps images (B, C, H, W) to features (B, F); or
            "open_clip:NAME", both towers, the projections and the tokenizer of an open_clip model with random weights.
        text_backbone: Text tower: a module that maps tokens (B, L) to vectors (B, T) and has T as ``num_features``;
            None is a small `nn.TextTransformer` of 3 layers and width 128.
        embedding_dim: D, the width of the embeddings.
        tokenizer: A function of a list of B str that returns int64 tokens (B, L); or the name of the open_clip model
            whose tokenizer it is, see `nn.OpenClipTokenizer`; None is `nn.ByteTokenizer`.
        context_length: Largest number of tokens of a text, for the default text tower and for a tokenizer that is not
            given as a function.
        text_kwargs: Arguments of the default text tower that replace its own: ``vocab_size`` (read from the tokenizer
            otherwise), ``width``, ``layers``, ``heads``.
        logit_scale: Multiplier of the cosine similarities at the start, in [1, max_logit_scale]; it is learned.
        max_logit_scale: Largest multiplier: after each optimizer step it is clamped to [1, max_logit_scale]; None does
            not clamp it.
        mask_same: Do not use pairs with the same "text", "index" or "label" as negatives; None uses all pairs.
        locked_image: Freeze the backbone and run it in eval mode (LiT); its projection is trained.
        optimizer: "adamw" as published, with the method's ``adamw_options``; "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute.
        weight_decay: Weight decay of all parameters except norms, biases, the scale, and those that a tower names in
            ``no_weight_decay()``: positions and class tokens.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0; the published 10,000 steps are about one epoch
            of LAION-400M.
        **options: See `MethodOptions`.
    """

    adamw_options: ClassVar[dict[str, Any]]
    """Options of ``optimizer="adamw"``."""
    has_bias: ClassVar[bool] = False
    """Whether the logits have a learned bias, the argument ``logit_bias``."""
    views = staticmethod(image_text_views)
    cached_modules: ClassVar[tuple[str, ...]] = ("backbone", "text_backbone")
    """The submodules that a `GradientCache` runs in chunks."""

    def __init__(
        self,
        backbone: str | nn.Module,
        text_backbone: nn.Module | None = None,
        *,
        embedding_dim: int = 512,
        tokenizer: Tokenizer | str | None = None,
        context_length: int = 77,
        text_kwargs: Mapping[str, int] | None = None,
        logit_scale: float = 1 / 0.07,
        max_logit_scale: float | None = 100.0,
        mask_same: SameImages | Literal["text"] | None = None,
        locked_image: bool = False,
        optimizer: OptimizerLike = "adamw",
        lr: float = 5e-4,
        weight_decay: float = 0.2,
        warmup_epochs: int = 1,
        **options: Unpack[MethodOptions],
    ) -> None:
        towers = find_open_clip(backbone)
        image_tower = backbone if towers is None else towers.image
        super().__init__(
            image_tower, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_at_least("embedding_dim", embedding_dim, 1)
        check_choice("mask_same", mask_same, (None, "label", "index", "text"))
        self.mask_same, self.locked_image = mask_same, locked_image
        if towers is None:
            self.tokenizer: Tokenizer = _tokenizer(tokenizer, context_length)
            self.text_backbone = _text_tower(text_backbone, self.tokenizer, context_length, text_kwargs)
            self.image_projection: nn.Module = _projection(self.feature_dim, embedding_dim)
            self.text_projection: nn.Module = _projection(read_feature_dim(self.text_backbone), embedding_dim)
        else:
            check_open_clip(towers, self.has_bias, text_backbone=text_backbone, text_kwargs=text_kwargs)
            self.tokenizer = _tokenizer(tokenizer or towers.name, towers.context_length)
            self.text_backbone, self.text_projection = towers.text, nn.Identity()  # the tower projects
            self.image_projection = towers.image_projection
        self.logit_scale = LogitScale(logit_scale, max_logit_scale)
        if locked_image:
            self.freeze_parts("backbone")
        self.save_hyperparameters()

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the embeddings of images (B, C, H, W), unit rows (B, D)."""
        return unit_rows(self.image_projection(self(images)))

    def encode_text(self, texts: list[str] | Tensor) -> Tensor:
        """Return the embeddings of B texts or of int64 tokens (B, L), unit rows (B, D).

        Raises:
            TypeError: If the texts are not a list of str.
            ValueError: If a text is empty.
        """
        return unit_rows(self.text_projection(self.text_backbone(self.tokenize(texts))))

    def tokenize(self, texts: list[str] | Tensor) -> Tensor:
        """Return the tokens of B texts, int64 (B, L), on the module's device; tokens are only moved there."""
        tokens = texts if isinstance(texts, Tensor) else self.tokenizer(check_captions(texts))
        return send(tokens, self.device)

    def batch_texts(self, batch: Any) -> list[str] | Tensor:
        """Return the texts of a training batch: B str, or int64 tokens (B, L)."""
        return batch_texts(batch, type(self).__name__)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of strings it would compile one step per batch
    def batch_tokens(self, batch: Any, size: int) -> Tensor:
        """Return the tokens (B, L) of a training batch of ``size`` images."""
        texts = self.batch_texts(batch)
        hint = "Yield one text for each image"
        require(len(texts) == size, "texts", f"be {size}, one for each image", len(texts), hint)
        return self.tokenize(texts)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch of images and texts, and features (B, F)."""
        (images,) = self.batch_views(batch, count=1)
        tokens = self.batch_tokens(batch, len(images))  # (B, L)
        features = self.backbone(images)  # (B, F)
        image = self.image_projection(features)  # (B, D)
        text = self.text_projection(self.text_backbone(tokens))  # (B, D)
        loss = self.pair_loss(image, text, self.groups(batch, tokens))
        self.log("train/loss", loss, batch_size=len(images))
        return {"loss": loss, "features": features.detach()}

    def groups(self, batch: Any, tokens: Tensor) -> Tensor | None:
        """Return ids (B,) that are equal for pairs that are no negatives of each other, or None."""
        if self.mask_same == "text":
            return text_ids(tokens)
        return sample_ids(batch, self.mask_same, type(self).__name__)

    def pair_loss(self, image: Tensor, text: Tensor, groups: Tensor | None) -> Tensor:
        """Return the loss of projections (B, D) of images and of their texts, a scalar."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: no weight decay on norms, biases, positions, class tokens and the scale."""
        exclude = ("norm", "bias", "declared")
        groups = optim.parameter_groups(strategy_module(self), self.weight_decay, exclude=exclude)
        return [group | self.adamw_options for group in groups] if self.optimizer == "adamw" else groups

    @classmethod
    def from_open_clip(cls, name: str, pretrained: str | None = None, **arguments: Any) -> Self:
        """Build the method around the towers, projections and tokenizer of an open_clip model.

        `forward` gives what the image tower outputs before its projection matrix, if it has one, else its output. Its
        weights expect images normalized with ``backbone.image_mean`` and ``backbone.image_std``. Needs the extra:
        ``pip install 'lightning_contrast[clip]'``.

        Args:
            name: Name of an open_clip configuration, such as "ViT-B-32".
            pretrained: A file of weights, or open_clip's tag of some, which are downloaded; None: random weights.
            **arguments: Arguments of the method, such as ``lr``; ``tokenizer`` replaces open_clip's, and
                ``logit_scale`` and ``logit_bias`` replace those of the weights.

        Raises:
            ModuleNotFoundError: If the extra is not installed.
            ValueError: If there is no model of this name, or it has a bias of its logits and the method has none.
        """
        towers = OpenClipTowers(name, pretrained)
        scalars = towers.scalars if cls.has_bias else {"logit_scale": towers.scalars["logit_scale"]}
        module = cls(towers, **(scalars | arguments))
        module.hparams["backbone"] = OPEN_CLIP + name  # from which a checkpoint builds the same towers
        return module


def _tokenizer(tokenizer: Tokenizer | str | None, context_length: int) -> Tokenizer:
    """Return the tokenizer that an argument names."""
    if tokenizer is None:
        return ByteTokenizer(context_length)
    if isinstance(tokenizer, str):
        return OpenClipTokenizer(tokenizer, context_length)
    if not callable(tokenizer):
        hint = "Give a function of a list of str that returns int64 tokens (B, L)"
        fail("tokenizer", "be callable", type(tokenizer).__name__, hint, TypeError)
    return tokenizer


def _text_tower(
    text_backbone: nn.Module | None, tokenizer: Tokenizer, context_length: int, kwargs: Mapping[str, int] | None
) -> nn.Module:
    """Return the given text tower, or the default one for the ids of a tokenizer."""
    if text_backbone is not None:
        hint = "Give these arguments where you build the module"
        require(not kwargs, "text_kwargs", "be None where `text_backbone` is given", kwargs, hint)
        if not isinstance(text_backbone, nn.Module):
            hint = "Give a module that maps tokens (B, L) to vectors (B, T), or None"
            fail("text_backbone", "be a module", type(text_backbone).__name__, hint, TypeError)
        return text_backbone
    given = check_dict("text_kwargs", kwargs)
    settings = _SMALL | {"vocab_size": getattr(tokenizer, "vocab_size", None)} | given
    if settings["vocab_size"] is None:
        hint = 'Give text_kwargs={"vocab_size": ...}, or a `text_backbone`'
        fail("tokenizer", "have a `vocab_size` for the default text tower", type(tokenizer).__name__, hint)
    return TextTransformer(context_length=context_length, **settings)  # type: ignore[arg-type]  # checked there


def _projection(width: int, embedding_dim: int) -> nn.Linear:
    """Return CLIP's projection: a matrix without bias, normal with standard deviation width^-0.5."""
    projection = nn.Linear(width, embedding_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def text_ids(tokens: Tensor) -> Tensor:
    """Return a 63-bit hash (B,) >= 0 of tokens (B, L), equal on all ranks; padding with 0 does not change it."""
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    factors = place * 0x1E3779B97F4A7C15  # wraps around
    factors = (factors ^ (factors >> 29)) * 0x3F58476D1CE4E5B9
    return (tokens * (factors | 1)).sum(1) & 0x7FFFFFFFFFFFFFFF
