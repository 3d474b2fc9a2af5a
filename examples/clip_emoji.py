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
WORDS = "ball medal game,animal bird tree,flag,food fruit,tool paper clothes,person man woman hand,face heart,"
WORDS = (WORDS + "button arrow sign,building vehicle clock").split(",")


def train(method: str, data: lc.data.EmojiDataModule, *, epochs: int, seed: int) -> tuple[Any, Any]:
    """Return the trained method and its view policy."""
    L.seed_everything(seed)
    mean, std = lc.data.estimate_mean_std(data)
    view = lc.augment.ViewSpec(32, (0.5, 1.0), (0.4, 0.4, 0.4, 0.1))  # color that varies: the other artist's differs
    policy = lc.augment.make_policy([view], mean=mean, std=std)
    tokenizer, tower = lc.nn.NGramTokenizer(), lc.nn.NGramTower(width=128, dropout=0.2)
    settings = {"embedding_dim": 128, "lr": 2e-3, "weight_decay": 0.1, "warmup_epochs": epochs // 20}
    model = getattr(lc, method)("small_convnet", tower, tokenizer=tokenizer, **settings)
    callbacks = [lc.ViewAugmentation(policy, seed=seed), lc.OnlineZeroShot(WORDS)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, check_val_every_n_epoch=40, **quiet)
    trainer.fit(model, datamodule=data)
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
    top1 = {"largest group": float(labels.bincount().max() / len(labels))}
    for name, words in (("group names", data.class_names), ("words", WORDS)):
        guesses = (images @ evaluation.zero_shot_weights(model, words).T).argmax(1)
        top1[f"zero-shot, {name}"] = float((guesses == labels).float().mean())
    split = [evaluation.encode(model, data.images(part), policy.eval_transform) for part in ("train", "val")]
    top1["linear probe"] = evaluation.linear_top1(split[0], data.labels("train"), split[1], labels)
    return found | {"groups": top1}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("CLIP", "SigLIP"), default="CLIP")
    for option, number in (("epochs", 120), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=number)
    parser.add_argument("--fold", type=int, help="validate on this fold (1-4) of the training things")
    parser.add_argument("--output", type=Path, default=Path("runs/clip_emoji"))
    args, start = parser.parse_args(), time.perf_counter()
    data = lc.data.EmojiDataModule(128, captions=True, artist="fluent", seed=args.seed, validation_fold=args.fold)
    model, policy = train(args.method, data, epochs=args.epochs, seed=args.seed)
    results = report(model, policy, data) | {"seconds": round(time.perf_counter() - start)}
    name, noto, captions = f"{args.method}_{args.seed}", data.artists("train")[0], data.captions("train")
    similarity = model.encode_text(captions).detach() @ embed(model, policy, noto).T
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    evaluation.caption_strips(noto, captions, similarity, range(20, 1220, 120)).savefig(args.output / f"{name}.png")
    print(json.dumps(results, indent=1))
