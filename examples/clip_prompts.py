"""Learned prompts for CLIP, CoOp and CoCoOp, which `adapt_clip_emoji.py` trains."""

import torch
import torch.nn.functional as F


class Prompts(torch.nn.Module):
    """Learned vectors between the first token of a class name and the rest, shared by all classes or for each class.

    In CoCoOp ("conditional") a small network adds a vector to them that it computes from the features of the image, so
    the texts of all classes are encoded for each image.
    """

    def __init__(self, model, names, length, *, per_class=False, conditional=False):
        super().__init__()
        self.model, self.length = model.requires_grad_(False), length
        self.table = next(layer for layer in model.text_backbone.modules() if isinstance(layer, torch.nn.Embedding))
        width, features = self.table.embedding_dim, len(model.encode_text(names)[0])
        self.context = torch.nn.Parameter(0.02 * torch.randn(len(names) if per_class else 1, length, width))
        self.meta = None
        if conditional:
            hidden = torch.nn.Linear(features, features // 16), torch.nn.ReLU()
            self.meta = torch.nn.Sequential(*hidden, torch.nn.Linear(features // 16, width))
        self.name(names)

    def name(self, names):
        """Set the names of the classes."""
        tokens = self.model.tokenize(names)  # (C, L)
        self.tokens = torch.cat([tokens[:, :1].repeat(1, 1 + self.length), tokens[:, 1:]], dim=1)

    def forward(self, features):
        """Return the cosines (B, C) of image features (B, D) with those of the classes."""
        context, classes = self.context.expand(len(self.tokens), -1, -1)[None], len(self.tokens)  # (1, C, length, E)
        if self.meta is not None:
            context = context + self.meta(features)[:, None, None]  # (B, C, length, E)
        rows, places = context.flatten(0, 1), slice(1, 1 + self.length)

        def replace(layer, args, output):
            return torch.cat([output[:, :1], rows, output[:, places.stop :]], dim=1)

        with self.table.register_forward_hook(replace):
            texts = self.model.encode_text(self.tokens.repeat(len(context), 1)).unflatten(0, (-1, classes))
        return (features[:, None] * texts).sum(2)


def learn(prompts, features, labels, scale, steps, lr):
    """Train prompts on cached image features (N, D): CoOp's on all of them per step, CoCoOp's on 16, for its memory."""
    batch = len(labels) if prompts.meta is None else 16
    optimizer = torch.optim.AdamW([part for part in prompts.parameters() if part.requires_grad], lr=lr, weight_decay=0)
    for _ in range(steps):
        rows = torch.randperm(len(labels))[:batch] if batch < len(labels) else slice(None)
        optimizer.zero_grad()
        F.cross_entropy(scale * prompts(features[rows]), labels[rows]).backward()
        optimizer.step()
    return prompts.requires_grad_(False)


def draw(labels, shots, seed):
    """Return the rows of images of each class to learn from, and as many others to choose settings on."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    found = [order[labels[order] == label][: 2 * shots].chunk(2) for label in labels.unique()]
    return [torch.cat(rows) for rows in zip(*found, strict=True)]
