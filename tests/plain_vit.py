"""A vision transformer and a distillation head in plain torch, on dicts of weights: no module of any library."""

import torch
import torch.nn.functional as F


def plain_tokens(weights, images, *, patch, heads, mask=None, keep=None, registers=False):
    """Return all tokens, the class token first, as a pre-norm transformer makes them; names are timm's."""
    w = {name.removeprefix("masked.").removeprefix("vit."): value for name, value in weights.items()}
    dim, rows = w["pos_embed"].shape[-1], images.shape[-1] // patch
    cuts = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, rows, columns, patch, patch)
    cuts = cuts.permute(0, 2, 3, 1, 4, 5).reshape(len(images), rows * rows, -1)
    x = cuts @ w["patch_embed.proj.weight"].reshape(dim, -1).T + w["patch_embed.proj.bias"]
    if mask is not None:
        x = torch.where(mask[:, :, None], w["mask_token"].reshape(1, 1, dim), x)
    prefix = [w["cls_token"]] + ([w["reg_token"]] if registers else [])
    count = sum(token.shape[1] for token in prefix)
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], 1) + positions(w["pos_embed"], rows, count)
    if keep is not None:
        x = torch.stack(
            [torch.cat([image[:count], image[count:][index]]) for image, index in zip(x, keep, strict=True)]
        )
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items() if f"blocks.{i}." in name}
        x = x + attention(block, norm(block, "norm1", x), heads)
        hidden = F.gelu(norm(block, "norm2", x) @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
        x = x + hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
    return norm(w, "norm", x)


def positions(table, rows, count):
    """Return the position of each token; the grid is resampled for images of another size."""
    own = int((table.shape[1] - count) ** 0.5)
    if own == rows:
        return table
    grid = table[:, count:].reshape(1, own, own, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, (rows, rows), mode="bicubic", antialias=True).to(table.dtype)
    return torch.cat([table[:, :count], grid.permute(0, 2, 3, 1).reshape(1, rows * rows, -1)], 1)


def norm(w, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(w, x, heads):
    b, n, d = x.shape
    q, k, v = (x @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).reshape(b, n, 3, heads, d // heads).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / (d // heads) ** 0.5
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(b, n, d)
    return mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]


def plain_head(w, x, layer="last_layer"):
    """Return the logits of a DINO head: linear and GELU but for the last, length 1, prototypes ``g v / |v|``."""
    for i in (0, 2, 4):
        x = x @ w[f"mlp.layers.{i}.weight"].T + w[f"mlp.layers.{i}.bias"]
        x = F.gelu(x) if i < 4 else x
    x = x / x.norm(dim=-1, keepdim=True)
    g, v = w[f"{layer}.weight_g"], w[f"{layer}.weight_v"]
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T
