"""Train CLIP or SigLIP on one artist's emoji and their names; retrieve and classify those of the other artist."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast import evaluation

# Words for the 9 groups, from their names and common members.
WORDS = "ball medal game,animal bird tree,flag,food fruit,tool paper clothes,person man woman hand,face heart,"
WORDS = (WORDS + "button arrow sign,building vehicle clock").split(",")


def train(method: str, data: lc.data.EmojiDataModule, *others: L.Callback, epochs: int, seed: int) -> tuple[Any, Any]:
    """Return the method, trained with further callbacks, and its view policy."""
    L.seed_everything(seed)
    mean, std = lc.data.estimate_mean_std(data)
    view = lc.augment.ViewSpec(32, (0.5, 1.0), (0.4, 0.4, 0.4, 0.1))  # color that varies: the other artist's differs
    policy = lc.augment.make_policy([view], mean=mean, std=std)
    settings = {"embedding_dim": 128, "lr": 2e-3, "weight_decay": 0.1, "warmup_epochs": epochs // 20}
    model = getattr(lc, method)("small_convnet", lc.nn.NGramTower(), tokenizer=lc.nn.NGramTokenizer(), **settings)
    callbacks = [lc.ViewAugmentation(policy, seed=seed), lc.OnlineZeroShot(WORDS), *others]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=epochs, callbacks=callbacks, check_val_every_n_epoch=40, **quiet).fit(model, datamodule=data)
    return model.eval(), policy


@torch.no_grad()
def embed(model: Any, policy: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of images, unit rows (N, D)."""
    return torch.cat([model.encode_image(policy.eval_transform(part)) for part in images.split(512)])


@torch.no_grad()
def report(model: Any, policy: Any, data: lc.data.EmojiDataModule) -> dict[str, Any]:
    """Return retrieval by text (to_gallery) and by image (to_queries), and the accuracy over the 9 groups."""
    (noto, fluent), unseen = data.artists("val"), data.captions("val")[: len(data.things("val"))]
    sets = {"seen things, other artist": (data.artists("train")[0], data.captions("train"))}
    sets |= {"unseen things, same artist": (fluent, unseen), "unseen things, other artist": (noto, unseen)}
    found: dict[str, Any] = {}
    for name, (images, texts) in sets.items():
        recall = lc.metrics.RetrievalRecall((1, 5, 10), both_ways=True)
        values = recall(model.encode_text(texts), embed(model, policy, images))
        found[name] = {key: round(float(value), 4) for key, value in values.items()}
    labels, images = data.labels("val"), embed(model, policy, data.images("val"))
    top1 = {"one of 9": 1 / 9, "largest group": float(labels.bincount().max() / len(labels))}
    texts, groups = model.encode_text(data.captions("train")), F.one_hot(data.labels("train")).float()
    weights = [evaluation.zero_shot_weights(model, names) for names in (data.class_names, WORDS)]
    weights.append(F.normalize(groups.T @ texts / groups.sum(0)[:, None]))  # the mean over the training things
    for name, vectors in zip(("group names", "words", "names of the training things"), weights, strict=True):
        top1[f"zero-shot, {name}"] = float(((images @ vectors.T).argmax(1) == labels).float().mean())
    split = [evaluation.encode(model, data.images(part), policy.eval_transform) for part in ("train", "val")]
    top1["linear probe"] = evaluation.linear_top1(split[0], data.labels("train"), split[1], labels)
    return found | {"groups": {name: round(value, 4) for name, value in top1.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("CLIP", "SigLIP"), default="CLIP")
    for option, number in (("epochs", 120), ("seed", 0), ("fold", None)):  # with a fold, 1-4: judge on training things
        parser.add_argument(f"--{option}", type=int, default=number)
    parser.add_argument("--output", type=Path, default=Path("runs/clip_emoji"))
    args, start = parser.parse_args(), time.perf_counter()
    data = lc.data.EmojiDataModule(128, captions=True, artist="fluent", seed=args.seed, validation_fold=args.fold)
    model, policy = train(args.method, data, epochs=args.epochs, seed=args.seed)
    results = report(model, policy, data) | {"seconds": round(time.perf_counter() - start)}
    path, noto, captions = args.output / f"{args.method}_{args.seed}", data.artists("train")[0], data.captions("train")
    similarity = model.encode_text(captions).detach() @ embed(model, policy, noto).T
    figure = evaluation.caption_strips(noto, captions, similarity, range(20, len(noto), len(noto) // 10))
    args.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{path}.png")
    Path(f"{path}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
