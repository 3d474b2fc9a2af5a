"""Attention maps of vision transformers, figures of them, and composed scenes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_probability, fail, require
from lightning_contrast.nn import check_image_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, *, layer: int = -1) -> Tensor:
    """Return the attention of the class token to each patch, for every head of a layer.

    Figure 1 of DINO (https://arxiv.org/abs/2104.14294): self-attention of the class token in the last
    layer. The model runs once in eval mode, and the mode of every submodule is restored. Images of other sizes than in
    training need a backbone that supports them
    (``backbone_kwargs=dict(dynamic_img_size=True)``); larger ones give finer maps.

    Args:
        model: A method of this package, whose ``backbone`` is used, or a vision transformer of timm with a class token.
            For the teacher of DINO, as in the paper, pass ``model.momentum_backbone``.
        images: Input of the model, (B, C, H, W) float: ``policy.eval_transform(images)``.
        layer: Index of the attention layer; negative counts from the end.

    Returns:
        (B, heads, H / patch, W / patch), float32, on the device of the model: attention of the class token in 0..1.
        Each map sums to 1 minus the attention to the class token and registers.

    Raises:
        ValueError: If the model has no class token or no such layer, or cannot take images of this size.
        TypeError: If the model has no attention layers.
    """
    backbone = getattr(model, "backbone", model)
    layers = _attentions(backbone)
    known = range(-len(layers), len(layers))
    require(layer in known, "layer", f"lie in {known.start}..{known.stop - 1}", layer, "Count from 0, or from the end")
    owner, prefix = _tokens(backbone)
    check_image_size(owner, images)
    parameter = next(backbone.parameters())
    attention = _record(backbone, layers[layer], images.to(parameter.device, parameter.dtype))
    rows = attention[:, :, 0, prefix:].float()  # (B, heads, patches), of the class token
    patch = cast("Any", owner).patch_embed.patch_size
    height, width = (-(-side // edge) for side, edge in zip(images.shape[-2:], patch, strict=True))
    if rows.shape[-1] != height * width:
        hint = "Use a vision transformer that keeps all patches in its attention"
        fail("model", f"attend to {height} x {width} patches", f"{rows.shape[-1]}", hint)
    maps: Tensor = rows.reshape(*rows.shape[:2], height, width)
    return maps


def attention_grid(
    images: Tensor, maps: Tensor, *, mass: float | None = None, names: Sequence[str] | None = None
) -> "Figure":
    """Draw a row for each image: the image, then what each head, or each word, looks at.

    Args:
        images: (N, C, H, W), uint8 or float in 0..1.
        maps: Attention of `attention_maps`, or of words by `GLoRIA.attention`, (N, heads, h, w).
        mass: Highlight the strongest patches with this share of the attention of the head, in [0, 1]; 0.6 in the
            figures of DINO. None shows the attention, scaled per map from its minimum to its maximum.
        names: Titles of the columns of maps; None: "head 1" and so on.

    Returns:
        A figure of N rows and 1 + heads columns. Needs matplotlib.

    Raises:
        ValueError: If the number of maps is not that of the images, or of names not that of maps, or ``mass`` lies
            outside [0, 1].
    """
    from lightning_contrast.evaluation.figures import image_grid

    fits = maps.ndim == 4 and len(maps) == len(images)
    require(fits, "maps", f"be ({len(images)}, heads, h, w)", tuple(maps.shape), "Give the maps of these images")
    titles = [f"head {head + 1}" for head in range(maps.shape[1])] if names is None else [*names]
    require(len(titles) == maps.shape[1], "names", f"be {maps.shape[1]}", titles, "Give one name per map of an image")
    maps, images = maps.cpu(), images.cpu()
    pictures = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if mass is None:
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        shown = _resize((maps - low) / (high - low).clamp_min(1e-12), images).unsqueeze(2)  # (N, heads, 1, H, W)
    else:
        check_probability("mass", mass)
        shown = pictures.unsqueeze(1) * (0.15 + 0.85 * _resize(strongest(maps, mass).float(), images).unsqueeze(2))
    rows = [[picture, *heads] for picture, heads in zip(pictures, shown, strict=True)]
    return image_grid(rows, ["image", *titles])


def strongest(maps: Tensor, mass: float) -> Tensor:
    """Return the smallest set of the strongest patches with a share of the attention of each map.

    Args:
        maps: (N, heads, h, w), not negative.
        mass: Share in [0, 1].

    Returns:
        Bool mask, (N, heads, h, w).
    """
    check_probability("mass", mass)
    flat = maps.flatten(2)
    values, order = (flat / flat.sum(2, keepdim=True).clamp_min(1e-12)).sort(2, descending=True)
    before = values.cumsum(2) - values  # share of the stronger patches
    return torch.zeros_like(order, dtype=torch.bool).scatter(2, order, before < mass).view_as(maps)


def compose_scenes(
    images: Tensor,
    count: int,
    *,
    size: int = 96,
    things: Sequence[int] = (3, 4),
    background: Sequence[int] = (255, 255, 255),
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compose several images on one background at random positions without overlap.

    Meant for the images of `EmojiDataModule`, with the same background.

    Args:
        images: uint8 (N, 3, h, w), drawn without repetition within a scene.
        count: Number of scenes, >= 1.
        size: Edge of a scene in pixels; a multiple of h and w at least as large as ``things`` asks for.
        things: Minimum and maximum number of images per scene.
        background: Color, 0..255 each.
        seed: Seed of choice and position.

    Returns:
        The scenes, uint8 (count, 3, size, size), and a mask, bool (count, size, size), of the pixels that differ from
        the background.

    Raises:
        ValueError: If a scene is too small, there are too few images, or a number is out of range.
        TypeError: If the images are not uint8.
    """
    check_at_least("count", count, 1)
    if images.dtype != torch.uint8 or images.ndim != 4:
        fail("images", "be uint8 (N, 3, h, w)", f"{images.dtype} {tuple(images.shape)}", "Give raw images", TypeError)
    height, width = images.shape[-2:]
    least, most = things
    rows, columns = size // height, size // width
    room = min(rows * columns, len(images))
    require(1 <= least <= most <= room, "things", f"be ordered and lie in 1..{room}", (least, most), "Enlarge `size`")
    generator = torch.Generator().manual_seed(seed)
    color = torch.tensor(background, dtype=torch.uint8).view(3, 1, 1)
    scenes = color.repeat(count, 1, size, size)
    for scene in scenes:
        number = int(torch.randint(least, most + 1, (), generator=generator))
        chosen = torch.randperm(len(images), generator=generator)[:number]
        places = _places(rows, columns, size, (height, width), generator)
        for image, (top, left) in zip(images[chosen], places[:number], strict=True):
            scene[:, top : top + height, left : left + width] = image
    return scenes, (scenes != color).any(1)


def _places(
    rows: int, columns: int, size: int, extent: tuple[int, int], generator: torch.Generator
) -> list[tuple[int, int]]:
    """Return a random upper left corner in every cell of a grid, in random order of the cells."""
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    corners = []
    for index in torch.randperm(len(cells), generator=generator).tolist():
        corner = []
        for cell, number, edge in zip(cells[index], (rows, columns), extent, strict=True):
            share = size // number  # edge of the cell, at least that of the image
            corner.append(cell * share + int(torch.randint(0, share - edge + 1, (), generator=generator)))
        corners.append((corner[0], corner[1]))
    return corners


def _resize(maps: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(maps, size=images.shape[-2:], mode="nearest")


def _attentions(backbone: nn.Module) -> list[nn.Module]:
    """Return the attention layers of timm, which have a dropout module after the softmax."""
    found = [
        m for m in backbone.modules() if hasattr(m, "fused_attn") and isinstance(getattr(m, "attn_drop", 0), nn.Module)
    ]
    if not found:
        hint = 'Use a vision transformer of timm, such as "vit_small_patch16_224"'
        fail("model", "have self-attention with a class token", type(backbone).__name__, hint, TypeError)
    return found


def _tokens(backbone: nn.Module) -> tuple[nn.Module, int]:
    """Return the module with the patch embedding and the number of tokens before the patches."""
    for module in backbone.modules():
        if hasattr(module, "patch_embed") and hasattr(module, "num_prefix_tokens"):
            if getattr(module, "cls_token", None) is None:
                break
            return module, cast("int", module.num_prefix_tokens)
    hint = "Build the vision transformer with class_token=True"
    fail("model", "have a class token before its patches", type(backbone).__name__, hint)


def _record(backbone: nn.Module, attention: Any, images: Tensor) -> Tensor:
    """Run the backbone in eval mode and return the weights of one attention layer, (B, heads, N, N)."""
    seen: list[Tensor] = []
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel does not compute the weights
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        backbone(images)
    finally:
        hook.remove()
        attention.fused_attn = fused
        for module, training in modes.items():
            module.training = training
    return seen[0]
