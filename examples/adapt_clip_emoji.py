"""Adapt CLIP to 9 groups with few labels: zero-shot, Tip-Adapter(-F), CoOp and CoCoOp, and a linear probe."""

import argparse
import itertools
import json
import statistics

import torch
import torch.nn.functional as F
from clip_emoji import embed, train
from clip_prompts import Prompts, draw, learn

import lightning_contrast as lc
from lightning_contrast import evaluation

BASE = 5  # groups that prompts for new groups are trained on

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
found = {"shots": options.shots, "seed": options.seed, "zero-shot": top1(features["test"] @ zero_shot)}
cache = {"cache_labels": truth["few"], "class_weights": zero_shot, "logit_scale": scale}
pairs = list(itertools.product(torch.linspace(0.1, 100, 40).tolist(), torch.linspace(0.1, 7, 24).tolist()))


def tip_adapter(row, keys):
    """Choose weight and sharpness on the validation images, never on the test set, and judge the keys."""
    logits = lambda name, pair: evaluation.tip_adapter_logits(  # noqa: E731
        features[name], keys, **cache, weight=pair[0], sharpness=pair[1]
    )
    best = max(pairs, key=lambda pair: top1(logits("val", pair), "val"))
    found[row], found[f"{row}: weight, sharpness"] = top1(logits("test", best)), best
    return {"weight": best[0], "sharpness": best[1]}


def prompted(names, rows, lr_rows, **kinds):
    """Train prompts for some classes with two rates, and return those that are best on validation images."""
    learned = []
    for lr in (2e-3, 2e-2):
        prompts = Prompts(model, names, options.length, **kinds)
        few = features["few"][rows], truth["few"][rows]
        learned.append(learn(prompts, *few, scale, options.steps, lr))
    right = lambda p: (p(features["val"][lr_rows]).argmax(1) == truth["val"][lr_rows]).sum()  # noqa: E731
    return max(learned, key=right)


keys = F.normalize(sum(model.encode_image(policy(images["few"])[0]).detach() for _ in range(10)), dim=1)  # of ten views
chosen = tip_adapter("Tip-Adapter", keys)
trained = {"validation": (features["val"], truth["val"]), "seed": options.seed}
keys = evaluation.fit_tip_adapter_keys(features["few"], truth["few"], keys, **cache, **chosen, **trained)
tip_adapter("Tip-Adapter-F", keys)
names, every = list(data.class_names), slice(None)
rows = {"CoOp": {}, "CoOp, per class": {"per_class": True}, "CoCoOp": {"conditional": True}}
for row, kinds in rows.items():
    found[row] = top1(prompted(names, every, every, **kinds)(features["test"]))
base = {name: labels < BASE for name, labels in truth.items()}
for row in ("zero-shot", "CoOp", "CoCoOp"):  # trained on the first five groups
    prompts = None if row == "zero-shot" else prompted(names[:BASE], base["few"], base["val"], **rows[row])
    shares = []
    for part, offset in ((names[:BASE], 0), (names[BASE:], BASE)):
        own = base["test"] == (offset == 0)
        rows_of = features["test"][own]
        if prompts is not None:
            prompts.name(part)
        cosines = rows_of @ evaluation.zero_shot_weights(model, part).T if prompts is None else prompts(rows_of)
        shares.append(float((cosines.argmax(1) + offset == truth["test"][own]).float().mean()))
    found[f"{row}: old, new groups"] = [round(share, 3) for share in (*shares, statistics.harmonic_mean(shares))]
found["linear probe"] = evaluation.linear_top1(features["few"], truth["few"], features["test"], truth["test"])
print(json.dumps(found))
