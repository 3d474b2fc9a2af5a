"""GLoRIA: images against texts, and each word against the regions of an image that it attends to.

Paper: Huang et al., ICCV 2021, https://doi.org/10.1109/ICCV48922.2021.00391. Reference implementation:
marshuang80/gloria.
Differs from it: negatives are of all ranks; AdamW and a cosine instead of Adam and a rate that drops on plateaus;
images keep their size (there all are resized to 299); a text's vector is the mean of its words (there zeros for padding
are averaged too, which only scales it); the default text tower is small and reads bytes.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from lightning_contrast._checks import (
    check_at_least,
    check_captions,
    check_choice,
    check_dict,
    check_positive,
    check_weights,
    fail,
    require,
)
from lightning_contrast.augment import gloria_views
from lightning_contrast.contracts import batch_texts
from lightning_contrast.losses import gloria_global_loss, gloria_local_loss, region_attention
from lightning_contrast.methods.base import SelfSupervisedModule
from lightning_contrast.methods.false_negatives import SameImages, check_mask_same, sample_ids
from lightning_contrast.nn import ByteTokenizer, RegionMaps, TextTransformer, read_feature_dim
from lightning_contrast.nn.byte_tokenizer import Tokenizer
from lightning_contrast.nn.region_maps import byte_words, token_words, word_vectors
from lightning_contrast.optim import OptimizerLike
from lightning_contrast.precision import full_precision, unit_rows
from lightning_contrast.runtime.method_options import MethodOptions
from lightning_contrast.seeding import send

_SMALL = {"width": 128, "layers": 3, "heads": 2}


class GLoRIA(SelfSupervisedModule):
    """Contrast images with texts, globally and by the regions that the words of a text attend to.

    A batch holds images (B, C, H, W) and texts: ``(images, texts)``, or a dict with "image" and "text". Texts are a
    list of str, or int64 tokens (B, L), each with a word: padding alone is refused on a CPU, and elsewhere counts as
    one word with a vector of zeros, whose cosine with everything is 0. `forward` gives the backbone's features (B, F);
    `encode_image` and `encode_text` give embeddings (B, D); `attention` gives the picture of each word in an image.
    Logs ``train/loss``, ``train/local_loss`` and ``train/global_loss``.

    Args:
        backbone: Name of a timm model, or a module that maps images (B, C, H, W) to features (B, F).
        text_backbone: A module whose ``forward_tokens(tokens)`` maps tokens (B, L) to the states of all tokens
            (B, L, D) and the lengths (B,), with D as ``num_features``; None is a small `nn.TextTransformer`.
        embedding_dim: D for the default text tower; a given one has its own.
        region_layer: Name of the backbone's submodule whose map (B, C, H, W) holds the regions; None is "layer3" if
            there is one, as published for ResNets, else the backbone itself, which must return a map.
        region_dim: C; None reads it from the last norm or convolution of the layer.
        tokenizer: A function of a list of B str that returns int64 tokens (B, L); None is `nn.ByteTokenizer`.
        context_length: Largest number of tokens of a text, for the default tokenizer and text tower.
        text_kwargs: Arguments of the default text tower that replace its own, as in `CLIP`.
        word_ids: A function of tokens (B, L) that returns the number of each token's word, int64 (B, L), and -1 for
            tokens of no word. None: words between spaces for `nn.ByteTokenizer`; for other tokenizers each token up to
            the length but the last, the end, is a word, and so is the start, as published.
        pieces: How the states of a word's tokens become one vector: "sum" as published, or "mean".
        local_weight: Weight of the local loss, >= 0.
        global_weight: Weight of the global loss, >= 0.
        attention_scale: Multiplier in the attention, > 0.
        word_scale: Multiplier of the cosines of words and regions, > 0.
        logit_scale: Multiplier of the logits of both losses, > 0.
        mask_same: Do not use pairs with the same "label" or "index" as negatives; None uses all pairs.
        optimizer: "adamw", "sgd", "lars", "lamb", or a callable.
        lr: Peak learning rate, absolute.
        weight_decay: Weight decay of all parameters except norms and biases.
        warmup_epochs: Epochs of linear warm-up before the cosine to 0.
        **options: See `MethodOptions`.
    """

    base_lr: ClassVar[float] = 5e-5
    sharded_methods: ClassVar = {"text_backbone": ("forward_tokens",)}
    cached_modules: ClassVar[tuple[str, ...]] = ("backbone", "text_backbone")
    """The submodules that a `GradientCache` runs in chunks."""
    views = staticmethod(gloria_views)

    def __init__(
        self,
        backbone: str | nn.Module,
        text_backbone: nn.Module | None = None,
        *,
        embedding_dim: int = 128,
        region_layer: str | None = None,
        region_dim: int | None = None,
        tokenizer: Tokenizer | None = None,
        context_length: int = 97,
        text_kwargs: Mapping[str, int] | None = None,
        word_ids: Callable[[Tensor], Tensor] | None = None,
        pieces: Literal["sum", "mean"] = "sum",
        local_weight: float = 1.0,
        global_weight: float = 1.0,
        attention_scale: float = 4.0,
        word_scale: float = 5.0,
        logit_scale: float = 10.0,
        mask_same: SameImages | None = None,
        optimizer: OptimizerLike = "adamw",
        lr: float = 5e-5,
        weight_decay: float = 1e-6,
        warmup_epochs: int = 0,
        **options: Unpack[MethodOptions],
    ) -> None:
        super().__init__(
            backbone, optimizer=optimizer, lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, **options
        )
        check_choice("pieces", pieces, ("sum", "mean"))
        check_weights(local_weight=local_weight, global_weight=global_weight)
        scales = {"attention_scale": attention_scale, "word_scale": word_scale, "logit_scale": logit_scale}
        for name, scale in scales.items():
            check_positive(name, scale)
        self.scales, self.pieces, self.mask_same = scales, pieces, check_mask_same(mask_same)
        self.local_weight, self.global_weight = local_weight, global_weight
        self.tokenizer: Tokenizer = ByteTokenizer(context_length) if tokenizer is None else tokenizer
        self.word_ids = byte_words if word_ids is None and isinstance(self.tokenizer, ByteTokenizer) else word_ids
        self.text_backbone = text_backbone or _small_tower(self.tokenizer, context_length, embedding_dim, text_kwargs)
        if not callable(getattr(self.text_backbone, "forward_tokens", None)):
            hint = "Wrap it in a module with `forward_tokens(tokens) -> ((B, L, D), (B,))`"
            kind = type(self.text_backbone).__name__
            fail("text_backbone", "have a method `forward_tokens`", kind, hint, TypeError)
        width = read_feature_dim(self.text_backbone)
        self.region_maps = RegionMaps(self.backbone, region_layer)
        channels = self.region_maps.channels(region_dim, self.feature_dim)
        self.image_projection = nn.Linear(self.feature_dim, width)
        self.region_projection = nn.Conv2d(channels, width, 1, bias=False)
        self.save_hyperparameters()

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the global embeddings of images (B, C, H, W), unit rows (B, D)."""
        return unit_rows(self.image_projection(self(images)))

    def encode_text(self, texts: list[str] | Tensor) -> Tensor:
        """Return the embeddings of B texts or of int64 tokens (B, L), unit rows (B, D)."""
        words, lengths, _ = self._words(self.tokenize(texts))
        return unit_rows(_mean_of_words(words, lengths))

    @torch.no_grad()
    def attention(self, images: Tensor, texts: list[str] | Tensor) -> tuple[Tensor, Tensor]:
        """Return where the words of B texts look in their images, for figures.

        Args:
            images: Images (B, C, H, W) as the backbone expects them.
            texts: B str, or int64 tokens (B, L).

        Returns:
            Attention (B, T, h, w) on the grid of regions, which sums to 1 for each word, and the word of each token,
            int64 (B, L), -1 for none.
        """
        words, lengths, ids = self._words(self.tokenize(texts))
        _, regions = self._encode(images)
        scale = self.scales["attention_scale"]
        return region_attention(words, regions, attention_scale=scale, lengths=lengths), ids

    def tokenize(self, texts: list[str] | Tensor) -> Tensor:
        """Return the tokens of B texts, int64 (B, L), on the module's device; tokens are only moved there."""
        tokens = texts if isinstance(texts, Tensor) else self.tokenizer(check_captions(texts))
        return send(tokens, self.device)

    def batch_texts(self, batch: Any) -> list[str] | Tensor:
        """Return the texts of a training batch: B str, or int64 tokens (B, L)."""
        return batch_texts(batch, "GLoRIA")

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of strings it would compile one step per batch
    def batch_tokens(self, batch: Any, size: int) -> Tensor:
        """Return the tokens (B, L) of a training batch of ``size`` images."""
        texts = self.batch_texts(batch)
        require(len(texts) == size, "texts", f"be {size}, one for each image", len(texts), "Yield one text per image")
        return self.tokenize(texts)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return the sum of the local and the global loss, and features (B, F)."""
        (images,) = self.batch_views(batch, count=1)
        tokens = self.batch_tokens(batch, len(images))  # (B, L)
        groups = sample_ids(batch, self.mask_same, "GLoRIA")
        features, regions = self._encode(images)  # (B, F), (B, D, h, w)
        words, lengths, _ = self._words(tokens)  # (B, D, T), (B,)
        local = gloria_local_loss(regions, words, lengths, **self.scales, groups=groups)
        image, text = self.image_projection(features), _mean_of_words(words, lengths)
        whole = gloria_global_loss(image, text, logit_scale=self.scales["logit_scale"], groups=groups)
        loss = self.local_weight * local + self.global_weight * whole
        parts = {"train/loss": loss, "train/local_loss": local.detach(), "train/global_loss": whole.detach()}
        for name, value in parts.items():
            self.log(name, value, batch_size=len(images))
        return {"loss": loss, "features": features.detach()}

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, F) and region vectors (B, D, h, w) of images (B, C, H, W)."""
        with self.region_maps.recording():
            features = self.backbone(images)
        return features, self.region_projection(self.region_maps.take())

    def _words(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return word vectors (B, D, T), the numbers of words (B,), and the word of each token of (B, L)."""
        tower: Any = self.text_backbone
        states, lengths = tower.forward_tokens(tokens)  # (B, L, D), (B,)
        ids = token_words(tokens, lengths) if self.word_ids is None else self.word_ids(tokens)
        most = tokens.shape[1] // 2 if self.word_ids is byte_words else tokens.shape[1]
        words, counts = _word_vectors(states, ids, most, mean=self.pieces == "mean")
        return words, counts, ids


def _small_tower(
    tokenizer: object, context_length: int, embedding_dim: int, kwargs: Mapping[str, int] | None
) -> TextTransformer:
    """Return the default text tower for the ids of a tokenizer."""
    check_at_least("embedding_dim", embedding_dim, 1)
    given = check_dict("text_kwargs", kwargs)
    settings: dict[str, Any] = _SMALL | {"vocab_size": getattr(tokenizer, "vocab_size", None)} | given
    if settings["vocab_size"] is None:
        hint = 'Give text_kwargs={"vocab_size": ...}, or a `text_backbone`'
        fail("tokenizer", "have a `vocab_size` for the default text tower", type(tokenizer).__name__, hint)
    return TextTransformer(context_length=context_length, embedding_dim=embedding_dim, **settings)


_word_vectors = full_precision(word_vectors)


@full_precision
def _mean_of_words(words: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean vectors (B, D) of words (B, D, T), which are 0 beyond the lengths (B,)."""
    return words.sum(2) / lengths[:, None]
