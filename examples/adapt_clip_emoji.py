"""Adapt CLIP to 9 groups with few labels: zero-shot, Tip-Adapter, learned prompts (CoOp), and a linear probe."""

import argparse
import itertools
import json

import torch
import torch.nn.functional as F
from clip_emoji import embed, train

import lightning_contrast as lc
from lightning_contrast import evaluation


class Prompts(torch.nn.Module):
    """CoOp: learned vectors between the first token of a class name and the rest, shared or for each class."""

    def __init__(self, model, names, length, per_class):
        super().__init__()
        self.model, tokens = model.requires_grad_(False), model.tokenize(names)  # (C, L)
        self.tokens, self.length = torch.cat([tokens[:, :1].repeat(1, 1 + length), tokens[:, 1:]], dim=1), length
        self.table = next(layer for layer in model.text_backbone.modules() if isinstance(layer, torch.nn.Embedding))
        contexts = len(names) if per_class else 1
        self.context = torch.nn.Parameter(0.02 * torch.randn(contexts, length, self.table.embedding_dim))

    def replace(self, layer, args, output):
        """Return the vectors of tokens (C, L, D) with the learned ones in their places."""
        return torch.cat([output[:, :1], self.context.expand(len(output), -1, -1), output[:, 1 + self.length :]], dim=1)

    def forward(self):
        """Return the features of the classes, unit rows (C, D)."""
        with self.table.register_forward_hook(self.replace):
            return self.model.encode_text(self.tokens)


def learn(prompts, features, labels, scale, steps, lr):
    """Train prompts on cached image features; return the weights of the classes (D, C)."""
    optimizer = torch.optim.AdamW([prompts.context], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(scale * features @ prompts().T, labels).backward()
        optimizer.step()
    return prompts().detach().T


def draw(labels, shots, seed):
    """Return the rows of images of each class to learn from, and as many others to choose settings on."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    found = [order[labels[order] == label][: 2 * shots].chunk(2) for label in labels.unique()]
    return [torch.cat(rows) for rows in zip(*found, strict=True)]


parser = argparse.ArgumentParser(description=__doc__)
for name, default in (("epochs", 40), ("shots", 16), ("seed", 0), ("length", 4), ("steps", 200)):
    parser.add_argument(f"--{name}", type=int, default=default)
options = parser.parse_args()
data = lc.data.EmojiDataModule(128, captions=True, artist="fluent", seed=options.seed)
model, policy = train("CLIP", data, epochs=options.epochs, seed=options.seed)
scale, noto, labels = float(model.logit_scale().detach()), data.artists("train")[0], data.labels("train")
few, val = draw(labels, options.shots, options.seed)
images = {"few": noto[few], "val": noto[val], "test": data.artists("test")[0]}
truth = {"few": labels[few], "val": labels[val], "test": data.labels("test").chunk(2)[0]}
features = {name: embed(model, policy, each) for name, each in images.items()}
top1 = lambda logits, name="test": float((logits.argmax(1) == truth[name]).float().mean())  # noqa: E731
zero_shot = evaluation.zero_shot_weights(model, data.class_names).T  # (D, 9)
keys = F.normalize(sum(model.encode_image(policy(images["few"])[0]).detach() for _ in range(10)), dim=1)  # of ten views
cache = {"cache_keys": keys, "cache_labels": truth["few"], "class_weights": zero_shot, "logit_scale": scale}
tip = lambda name, a, b: evaluation.tip_adapter_logits(features[name], **cache, weight=a, sharpness=b)  # noqa: E731
found = {"shots": options.shots, "seed": options.seed, "zero-shot": top1(features["test"] @ zero_shot)}
grid = itertools.product(torch.linspace(0.1, 100, 40).tolist(), torch.linspace(0.1, 7, 24).tolist())
found["weight, sharpness"] = max(grid, key=lambda pair: top1(tip("val", *pair), "val"))  # never on the test set
found["Tip-Adapter"] = top1(tip("test", *found["weight, sharpness"]))
for row, per_class in (("CoOp", False), ("CoOp, per class", True)):
    learned = []
    for lr in (2e-3, 2e-2):
        prompts = Prompts(model, list(data.class_names), options.length, per_class)
        learned.append(learn(prompts, features["few"], truth["few"], scale, options.steps, lr))
    found[row] = top1(features["test"] @ max(learned, key=lambda weights: top1(features["val"] @ weights, "val")))
found["linear probe"] = evaluation.linear_top1(features["few"], truth["few"], features["test"], truth["test"])
print(json.dumps(found))
