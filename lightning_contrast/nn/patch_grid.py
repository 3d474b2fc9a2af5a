"""A network that sees an image as a grid of overlapping patches, each encoded alone, and contexts of that grid."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, require
from lightning_contrast.nn.backbones import BUILT_AS, read_feature_dim


class PatchGrid(nn.Module):
    """Encode overlapping patches of an image one by one, as contrastive predictive coding does.

    Args:
        network: A module from patches (P, C, p, p) to features (P, F).
        patch_size: Edge p of the patches in pixels, >= 1.
        stride: Distance of neighboring patches in pixels, >= 1; half of ``patch_size`` lets them overlap by half.
        feature_dim: F; None reads it from the network.

    Attributes:
        num_features: F, the width of the features.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is too small.

    Example:
        >>> grid = PatchGrid(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)), 8, 4, feature_dim=5)
        >>> grid.maps(torch.zeros(2, 3, 32, 32)).shape, grid(torch.zeros(2, 3, 32, 32)).shape
        (torch.Size([2, 5, 7, 7]), torch.Size([2, 5]))
    """

    def __init__(self, network: nn.Module, patch_size: int, stride: int, *, feature_dim: int | None = None) -> None:
        super().__init__()
        check_at_least("patch_size", patch_size, 1)
        check_at_least("stride", stride, 1)
        self.network, self.patch_size, self.stride = network, patch_size, stride
        self.num_features = read_feature_dim(network) if feature_dim is None else feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, F) of images (B, C, H, W): the mean over their patches."""
        return self.maps(images).mean((2, 3))

    def maps(self, images: Tensor, *, drop_channels: float = 0.0) -> Tensor:
        """Return the features of all patches, (B, F, R, S), of images (B, C, H, W).

        Args:
            images: Images (B, C, H, W); pixels at the right and lower edge that fill no patch are not used.
            drop_channels: Probability, for each patch, of setting all its channels but one to 0.

        Raises:
            ValueError: If an edge is smaller than a patch.
        """
        rows, columns = self.grid_size(images)
        size, stride = self.patch_size, self.stride
        cut = [
            images[:, :, row * stride : row * stride + size, column * stride : column * stride + size]
            for row in range(rows)
            for column in range(columns)
        ]
        patches = torch.stack(cut, 1).flatten(0, 1)  # (B R S, C, p, p); unfold would fix B in an exported graph
        if drop_channels > 0:
            draw = partial(torch.rand, dtype=torch.float32, device=patches.device)
            kept = draw(len(patches), images.shape[1]).argsort(1) == 0  # one channel of each
            kept = kept | (draw(len(patches), 1) >= drop_channels)
            patches = patches * kept[:, :, None, None]
        features: Tensor = self.network(patches)  # (B R S, F)
        return features.view(-1, rows, columns, features.shape[1]).permute(0, 3, 1, 2)

    def grid_size(self, images: Tensor) -> tuple[int, int]:
        """Return the rows R and columns S of patches of images (B, C, H, W)."""
        height, width = images.shape[-2:]
        fits = min(height, width) >= self.patch_size
        hint = "Enlarge the images, or set a smaller `patch_size`"
        require(fits, "images", f"be at least {self.patch_size} pixels wide and high", (height, width), hint)
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1


class GridContext(nn.Module):
    """Residual masked convolutions over a grid: the context of a place is its own row and the rows above.

    As in appendix A of CPC v2 (https://arxiv.org/abs/1905.09272), which takes it from PixelCNN: each block is a 1x1, a
    1x3, a 2x1 (this row and the one above) and a 1x1 convolution with ReLU in between. A context reaches as many rows
    up, and as many columns to each side, as there are blocks.

    Args:
        in_dim: F, the width of the grid's vectors.
        width: C, the width of the context; if it is not ``in_dim``, a 1x1 convolution without bias comes first.
        layers: Number of blocks, >= 1; 5 in the paper.
        hidden_dim: Width inside a block, >= 1; 256 in the paper.

    Raises:
        TypeError: If a size is not a whole number.
        ValueError: If a size is below 1.
    """

    def __init__(self, in_dim: int, width: int, layers: int = 5, hidden_dim: int = 256) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("width", width), ("layers", layers), ("hidden_dim", hidden_dim)):
            check_at_least(name, value, 1)
        self.entry: nn.Module = nn.Conv2d(in_dim, width, 1, bias=False) if in_dim != width else nn.Identity()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, hidden_dim, 1),
                nn.ReLU(),
                nn.Conv2d(hidden_dim, hidden_dim, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),
                nn.Conv2d(hidden_dim, hidden_dim, (2, 1)),
                nn.ReLU(),
                nn.Conv2d(hidden_dim, width, 1),
            )
            for _ in range(layers)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return the contexts (B, C, R, S) of maps (B, F, R, S)."""
        context = self.entry(maps)
        for block in self.blocks:
            context = context + block(context)
        return F.relu(context)


class RowPredictor(nn.Module):
    """The context of a grid and what it predicts of the K rows below, in one module, since strategies shard modules.

    Args:
        in_dim: F, the width of the grid's vectors.
        out_dim: D, the width of predictions, made by 1x1 convolutions; None: the bilinear matrices of CPC v1.
        steps: K, how many rows are predicted.
        context_dim: C, the width of the context.
        layers: As in `GridContext`.
        hidden_dim: As in `GridContext`.
    """

    def __init__(
        self, in_dim: int, out_dim: int | None, steps: int, *, context_dim: int, layers: int, hidden_dim: int
    ) -> None:
        super().__init__()
        self.context, self.bilinear = GridContext(in_dim, context_dim, layers, hidden_dim), out_dim is None
        sizes = (in_dim, context_dim) if out_dim is None else (context_dim, out_dim)
        self.steps = nn.ModuleList(nn.Conv2d(*sizes, 1, bias=not self.bilinear) for _ in range(steps))

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        """Return K predictions (B, D, R, S) of maps (B, F, R, S); bilinear: contexts (B, C, R, S) and W (K, C, F)."""
        context = self.context(maps)
        if self.bilinear:
            return context, torch.stack([step.weight.flatten(1) for step in self.steps])  # type: ignore[operator]
        return tuple(step(context) for step in self.steps)


class GridPredictors(nn.ModuleList):
    """One `RowPredictor` per direction, in a module with a ``forward``, which FSDP2 needs.

    Args:
        in_dim: As in `RowPredictor`.
        out_dim: As in `RowPredictor`.
        steps: As in `RowPredictor`.
        directions: Number of directions, 1 (down) or 4 (down, up, right, left).
        **sizes: ``context_dim``, ``layers`` and ``hidden_dim`` of `RowPredictor`.
    """

    def __init__(self, in_dim: int, out_dim: int | None, steps: int, *, directions: int, **sizes: int) -> None:
        super().__init__(RowPredictor(in_dim, out_dim, steps, **sizes) for _ in range(directions))

    def forward(self, maps: Tensor) -> list[tuple[Tensor, ...]]:
        """Return what each predictor makes of maps (B, F, R, S), turned so that its direction is down."""
        return [predictor(turn_grid(maps, turn)) for turn, predictor in enumerate(self)]


def turn_grid(maps: Tensor, turn: int) -> Tensor:
    """Return maps (B, C, R, S) so that down is down, up, right or left for turn 0, 1, 2 or 3."""
    maps = maps.transpose(2, 3) if turn >= 2 else maps
    return maps.flip(2) if turn % 2 else maps


def replace_batchnorm(network: nn.Module) -> nn.Module:
    """Replace every BatchNorm over maps by a LayerNorm over channels and places, in place, and return the network.

    BatchNorm lets a patch learn from the other patches of its batch what it should predict of them, so CPC v2 has
    LayerNorm. The new layers are ``nn.GroupNorm`` with one group, with weights 1 and biases 0.

    Args:
        network: A convolutional network from images ``(B, C, H, W)``.

    Returns:
        The same network, or a GroupNorm if it is itself a BatchNorm.
    """
    if isinstance(network, nn.BatchNorm2d):
        norm = nn.GroupNorm(1, network.num_features, eps=network.eps, affine=network.affine)
        rest = [part for part in (getattr(network, "drop", None), getattr(network, "act", None)) if part is not None]
        return nn.Sequential(norm, *rest) if rest else norm  # timm's norms may hold an activation
    for name, child in network.named_children():
        setattr(network, name, replace_batchnorm(child))
    if (built := getattr(network, BUILT_AS, None)) is not None:  # exported files say how the network is built again
        object.__setattr__(network, BUILT_AS, {**built, "layer_norm": True})
    return network
