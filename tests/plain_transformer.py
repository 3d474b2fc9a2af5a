"""A vision transformer and AdamW in plain matrices: the oracle of the methods that leave patches out."""

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
    """A pre-norm transformer block on the tokens (N, F) of one image, one head after the other."""
    q, k, v = linear(norm(x, weights, "norm1"), weights, "attn.qkv").chunk(3, dim=-1)
    width, out = x.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        out.append((q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1) @ v[:, part])
    x = x + linear(torch.cat(out, 1), weights, "attn.proj")
    return x + linear(F.gelu(linear(norm(x, weights, "norm2"), weights, "mlp.fc1")), weights, "mlp.fc2")


def blocks(x, weights, heads):
    """All blocks of a network, in order."""
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    for number in range(depth):
        x = block(x, below(weights, f"blocks.{number}."), heads)
    return x


def vit(weights, image, keep=None, *, patch, heads):
    """Return the tokens (1 + K, F), or (K, F) without class token, that timm's network makes of an image (C, H, W)."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    tokens = []
    for row in range(rows):
        for column in range(columns):
            pixels = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            kernel = weights["patch_embed.proj.weight"]
            tokens.append((kernel * pixels).sum((1, 2, 3)) + weights["patch_embed.proj.bias"])
    tokens = torch.stack(tokens)
    class_token, positions = weights.get("cls_token"), weights["pos_embed"][0]
    first = [] if class_token is None else [class_token[0] + positions[:1]]
    positions = positions[len(first) :]
    if len(positions) != len(tokens):  # resampled in float32, as timm does
        side = math.isqrt(len(positions))
        square = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, (rows, columns), mode="bicubic", antialias=True)
        positions = square.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(tokens.dtype)
    tokens = tokens + positions
    if keep is not None:
        tokens = torch.stack([tokens[int(place)] for place in keep])
    return norm(blocks(torch.cat([*first, tokens]), weights, heads), weights, "norm")


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
