"""CLIP: images are contrasted with the texts of the global batch.

Paper: https://arxiv.org/abs/2103.00020. Reference implementation: mlfoundations/open_clip; with ``locked_image=True``
LiT (https://arxiv.org/abs/2111.07991).
Differs from it: gradients flow through the features of all ranks (``gather_with_grad``, which is off there), the text
tower is small and reads bytes unless another is given, the warm-up is counted in epochs.
"""

from typing import Any, ClassVar

from torch import Tensor

from lightning_contrast.losses import clip_loss
from lightning_contrast.methods.image_text import ImageTextModule


class CLIP(ImageTextModule):
    """Contrast each image with all texts, and each text with all images, of the global batch.

    Batches, encoders and arguments are those of `ImageTextModule`: by default a learned scale that starts at 1 / 0.07
    and is clamped to [1, 100] after each optimizer step, and AdamW with learning rate 5e-4, weight decay 0.2, betas
    (0.9, 0.98) and epsilon 1e-6.
    """

    base_lr: ClassVar[float] = 5e-4
    adamw_options: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.98), "eps": 1e-6}

    def pair_loss(self, image: Tensor, text: Tensor, groups: Tensor | None) -> Tensor:
        """Return the loss of projections (B, D) of images and of their texts, a scalar."""
        scale = self.logit_scale()
        self.log("train/logit_scale", scale.detach())
        return clip_loss(image, text, logit_scale=scale, groups=groups)
