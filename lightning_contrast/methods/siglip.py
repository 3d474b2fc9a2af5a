"""SigLIP: each pair of an image and a text of the global batch is classified as matching or not.

Paper: https://arxiv.org/abs/2303.15343. Reference implementations: google-research/big_vision, mlfoundations/open_clip.
Differs from them: the default text tower is CLIP's causal one, and both towers have a projection without bias (there
the text tower sees all tokens, only it has a projection, with a bias); the scale is clamped at 100 as in open_clip
(big_vision does not: ``max_logit_scale=None``).
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_contrast._checks import check_interval
from lightning_contrast.losses import siglip_loss
from lightning_contrast.methods.image_text import ImageTextModule
from lightning_contrast.nn import LogitBias


class SigLIP(ImageTextModule):
    """Classify all pairs of the global batch by a sigmoid with a learned scale and bias.

    Batches and encoders are those of `ImageTextModule`. A pair of another image and text with the same id under
    ``mask_same`` counts neither as positive nor as negative.

    Args:
        backbone: Image tower, as in `ImageTextModule`.
        text_backbone: Text tower, as in `ImageTextModule`.
        logit_scale: Multiplier of the cosine similarities at the start, in [1, max_logit_scale].
        logit_bias: Bias of the logits at the start.
        lr: Peak learning rate, absolute.
        weight_decay: Weight decay, as in `ImageTextModule`.
        **arguments: Further arguments of `ImageTextModule`.
    """

    base_lr: ClassVar[float] = 1e-3
    has_bias: ClassVar[bool] = True
    adamw_options: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.95)}

    def __init__(
        self,
        backbone: str | nn.Module,
        text_backbone: nn.Module | None = None,
        *,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        **arguments: Any,
    ) -> None:
        super().__init__(
            backbone, text_backbone, logit_scale=logit_scale, lr=lr, weight_decay=weight_decay, **arguments
        )
        check_interval("logit_bias", logit_bias, "(-inf, inf)", "The paper starts at -10")
        self.logit_bias = LogitBias(logit_bias)
        self.save_hyperparameters()

    def pair_loss(self, image: Tensor, text: Tensor, groups: Tensor | None) -> Tensor:
        """Return the loss of projections (B, D) of images and of their texts, a scalar."""
        scale, bias = self.logit_scale(), self.logit_bias()
        self.log("train/logit_scale", scale.detach())
        self.log("train/logit_bias", bias.detach())
        return siglip_loss(image, text, logit_scale=scale, logit_bias=bias, groups=groups)
