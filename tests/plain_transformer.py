"""A vision transformer, a distillation head and AdamW in plain torch, on dicts of weights: no module of any library.

The oracle of the methods on transformers; names of the weights are timm's.
"""

import math

import torch
import torch.nn.functional as F


def below(weights, prefix):
    """Return the weights whose name begins with a prefix, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def norm(x, weights, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def block(x, weights, heads):
    """A pre-norm transformer block on tokens (..., N, F), one head after the other."""
    q, k, v = linear(norm(x, weights, "norm1"), weights, "attn.qkv").chunk(3, dim=-1)
    width, out = x.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        out.append((q[..., part] @ k[..., part].mT / math.sqrt(width)).softmax(-1) @ v[..., part])
    x = x + linear(torch.cat(out, -1), weights, "attn.proj")
    return x + linear(F.gelu(linear(norm(x, weights, "norm2"), weights, "mlp.fc1")), weights, "mlp.fc2")


def blocks(x, weights, heads):
    """All blocks of a network, in order."""
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for number in range(depth):
        x = block(x, below(weights, f"blocks.{number}."), heads)
    return x


def plain_tokens(weights, images, *, patch, heads, mask=None, keep=None, registers=False):
    """Return all tokens of images (B, C, H, W), the class token first where there is one: (B, 1 + K, F)."""
    w = {name.removeprefix("masked.").removeprefix("vit."): value for name, value in weights.items()}
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    kernel, tokens = w["patch_embed.proj.weight"], []
    for row in range(rows):
        for column in range(columns):
            pixels = images[:, None, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append((kernel * pixels).sum((2, 3, 4)) + w["patch_embed.proj.bias"])
    x = torch.stack(tokens, 1)
    if mask is not None:
        x = torch.where(mask[:, :, None], w["mask_token"].reshape(1, 1, -1), x)
    prefix = [w["cls_token"]] if "cls_token" in w else []
    prefix += [w["reg_token"]] if registers else []
    count = sum(token.shape[1] for token in prefix)
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], 1)
    x = x + positions(w["pos_embed"], rows, columns, count)
    if keep is not None:
        kept = zip(x, keep, strict=True)
        x = torch.stack([torch.cat([image[:count], image[count:][index]]) for image, index in kept])
    return norm(blocks(x, w, heads), w, "norm")


def positions(table, rows, columns, count):
    """Return the position of each token; the grid is resampled, in float32 as timm does, for images of another size."""
    side = math.isqrt(table.shape[1] - count)
    if side * side == rows * columns:
        return table
    grid = table[:, count:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True).to(table.dtype)
    return torch.cat([table[:, :count], grid.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)], 1)


def vit(weights, image, keep=None, *, patch, heads):
    """Return the tokens (1 + K, F), or (K, F) without class token, of one image (C, H, W)."""
    return plain_tokens(weights, image[None], patch=patch, heads=heads, keep=None if keep is None else [keep])[0]


def plain_head(w, x, layer="last_layer"):
    """Return the logits of a DINO head: linear and GELU but for the last, length 1, prototypes ``g v / |v|``."""
    for i in (0, 2, 4):
        x = linear(x, w, f"mlp.layers.{i}")
        x = F.gelu(x) if i < 4 else x
    x = x / x.norm(dim=-1, keepdim=True)
    g, v = w[f"{layer}.weight_g"], w[f"{layer}.weight_v"]
    return x @ (g * v / v.norm(dim=1, keepdim=True)).T


class AdamW:
    """AdamW on weights by name, with a rate and a decay for each step."""

    def __init__(self):
        self.moments = {}

    def step(self, weights, gradients, lr, decays):
        """Return the weights after a step; ``decays`` has the decay of each."""
        new = dict(weights)
        for name, gradient in gradients.items():
            first, second, count = self.moments.get(name, (0, 0, 0))
            first, second, count = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2, count + 1
            self.moments[name] = first, second, count
            value = weights[name] * (1 - lr * decays[name])
            new[name] = value - lr * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        return new


def published_rate(step, warmup, planned, *, start, peak, final):
    """The learning rate of the programs of MSN and I-JEPA, which count steps from 1."""
    step += 1
    if step < warmup:
        return start + step / warmup * (peak - start)
    progress = (step - warmup) / (planned - warmup)
    return max(final, final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def published_decay(step, planned, first, last):
    """The weight decay of these programs."""
    return min(last, last + (first - last) * 0.5 * (1 + math.cos(math.pi * (step + 1) / planned)))
