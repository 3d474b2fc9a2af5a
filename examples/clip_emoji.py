"""Train CLIP or SigLIP on one artist's emoji and their names; retrieve and classify those of the other artist."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_contrast as lc
from lightning_contrast import evaluation

# Words for the 9 groups, from their names and common members.
WORDS = ("ball medal game", "animal bird tree", "flag", "food fruit", "tool paper clothes", "person man woman hand")
WORDS += ("face heart", "button arrow sign", "building vehicle clock")


def train(method: str, data: lc.data.EmojiDataModule, *, epochs: int, seed: int) -> tuple[Any, Any]:
    """Return the trained method and its view policy."""
    L.seed_everything(seed)
    mean, std = lc.data.estimate_mean_std(data)
    view = lc.augment.ViewSpec(32, (0.5, 1.0), (0.4, 0.4, 0.4, 0.1))  # color that varies: the other artist's differs
    policy = lc.augment.make_policy([view], mean=mean, std=std)
    tokenizer = lc.nn.NGramTokenizer()
    tower = lc.nn.NGramTower(tokenizer.vocab_size, width=128, dropout=0.2)
    settings = {"embedding_dim": 128, "lr": 2e-3, "weight_decay": 0.1, "warmup_epochs": epochs // 20}
    model = getattr(lc, method)("small_convnet", tower, tokenizer=tokenizer, **settings)
    callbacks = [lc.ViewAugmentation(policy, seed=seed), lc.OnlineZeroShot(WORDS)]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    every = max(epochs // 4, 1)
    L.Trainer(max_epochs=epochs, check_val_every_n_epoch=every, accelerator="cpu", callbacks=callbacks, **quiet).fit(
        model, datamodule=data
    )
    return model.eval(), policy


@torch.no_grad()
def embed(model: Any, policy: Any, images: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of images, unit rows (N, D)."""
    return torch.cat([model.encode_image(policy.eval_transform(part)) for part in images.split(512)])


@torch.no_grad()
def report(model: Any, policy: Any, data: lc.data.EmojiDataModule) -> dict[str, dict[str, float]]:
    """Return retrieval by text (to_gallery) and by image (to_queries), and the accuracy over the 9 groups."""
    own, other = (1, 0) if data.artist == "fluent" else (0, 1)
    unseen = data.captions("val")[: len(data.things("val"))]
    sets = {"seen things, other artist": (data.artists("train")[other], data.captions("train"))}
    sets |= {"unseen things, same artist": (data.artists("val")[own], unseen)}
    sets |= {"unseen things, other artist": (data.artists("val")[other], unseen)}
    found = {}
    for name, (images, texts) in sets.items():
        metric = lc.metrics.RetrievalRecall((1, 5, 10), both_ways=True)
        metric.update(model.encode_text(texts), embed(model, policy, images))
        found[name] = {key: round(float(value), 4) for key, value in metric.compute().items()}
    labels, images = data.labels("val"), embed(model, policy, data.images("val"))
    top1 = {"largest group": float(labels.bincount().max() / len(labels))}
    for name, words in {"zero-shot, group names": data.class_names, "zero-shot, words": WORDS}.items():
        logits = images @ evaluation.zero_shot_weights(model, words).T
        top1[name] = float((logits.argmax(1) == labels).float().mean())
    split = [evaluation.encode(model, data.images(part), policy.eval_transform) for part in ("train", "val")]
    top1["linear probe"] = evaluation.linear_top1(split[0], data.labels("train"), split[1], labels)
    return found | {"groups": top1}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("CLIP", "SigLIP"), default="CLIP")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, help="validate on this fold (1-4) of the training things")
    parser.add_argument("--output", type=Path, default=Path("runs/clip_emoji"))
    options, start = parser.parse_args(), time.perf_counter()
    data = lc.data.EmojiDataModule(128, captions=True, artist="fluent", seed=options.seed, validation_fold=options.fold)
    model, policy = train(options.method, data, epochs=options.epochs, seed=options.seed)
    results: dict[str, Any] = report(model, policy, data)
    results["seconds"] = round(time.perf_counter() - start)
    name, noto, captions = f"{options.method}_{options.seed}", data.artists("train")[0], data.captions("train")
    with torch.no_grad():
        similarity = model.encode_text(captions) @ embed(model, policy, noto).T
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = range(20, len(captions), len(captions) // 10)[:10]
    evaluation.caption_strips(noto, captions, similarity, rows).savefig(options.output / f"{name}.png")
    print(json.dumps(results, indent=1))
