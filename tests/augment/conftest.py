from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

EMOJI = Path(__file__).parents[2] / "lightning_contrast" / "data" / "emoji" / "emoji32.npz"


@pytest.fixture(scope="session")
def emoji() -> Tensor:
    """All drawings of one artist on white, (1558, 3, 32, 32) uint8."""
    rgba = torch.from_numpy(np.load(EMOJI)["noto"]).permute(0, 3, 1, 2).float()
    alpha = rgba[:, 3:] / 255
    return (rgba[:, :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


@pytest.fixture(scope="session")
def photos(emoji: Tensor) -> Tensor:
    """Six larger uint8 images with fine structure, (6, 3, 100, 130)."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(emoji[::260].float(), (100, 130), mode="bicubic").clamp(0, 255)
    return (0.7 * smooth + 0.3 * 255 * torch.rand_like(smooth)).round().to(torch.uint8)
