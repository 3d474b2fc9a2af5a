"""Does CLIP read order? "cat left of dog" against "dog left of cat": text, image and group score on composed scenes."""

import argparse
import json
from pathlib import Path

import lightning as L
import torch

import lightning_contrast as lc


def exchanged(images, masks):
    """Return scenes (N, 3, P, P) with both things in each other's place, of scenes and their masks (N, 2, P, P)."""
    swapped = torch.full_like(images, 255)
    for new, image, pair in zip(swapped, images, masks, strict=True):
        boxes = [
            torch.stack([place.aminmax()[i] for place in one.nonzero(as_tuple=True)]) for one in pair for i in (0, 1)
        ]
        starts, ends = boxes[::2], [end + 1 for end in boxes[1::2]]
        for here, there in ((0, 1), (1, 0)):
            size = ends[here] - starts[here]
            top, left = ((starts[there] + ends[there] - size) // 2).clamp(min=0).minimum(pair.shape[1] - size).tolist()
            (a, b), (c, d) = starts[here].tolist(), ends[here].tolist()
            target, drawn = new[:, top : top + c - a, left : left + d - b], pair[here, a:c, b:d]
            target[:, drawn] = image[:, a:c, b:d][:, drawn]
    return swapped


@torch.no_grad()
def scores(model, policy, data, split, count):
    """Return the scores of the last scenes of a split, each beside the scene with both things exchanged."""
    model.eval()
    images = data.images(split)[-count:]
    pictures = (images, exchanged(images, data.masks(split)[-count:]))
    texts = (data.captions(split)[-count:], data.swapped_captions(split)[-count:])
    encoded = torch.stack([model.encode_image(policy.eval_transform(picture)) for picture in pictures], 1)
    similarity = torch.stack([model.encode_text(captions) for captions in texts], 1) @ encoded.mT  # (N, texts, images)
    found = lc.evaluation.winoground_scores(similarity, tie=1e-5)  # what differs by less is equal, and so wrong
    return {name: round(value, 3) for name, value in found.items()}


def main():
    """Train, and print the scores and those of chance."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"--epochs": 20, "--scenes": 4096, "--seed": 0}.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--words", action="store_true", help="a text tower without word order")
    parser.add_argument("--output", type=Path, default=Path("runs/composed_scenes"))
    args = parser.parse_args()
    L.seed_everything(args.seed)
    data = lc.data.EmojiScenesDataModule(128, scenes=args.scenes, seed=args.seed)
    unseen_scenes = lc.data.EmojiScenesDataModule(scenes=args.scenes + 512)  # its last scenes are not in training
    policy = lc.augment.image_text_views(80, mean=(0.84, 0.8, 0.75), std=(0.28, 0.26, 0.33))
    tower = (lc.nn.NGramTower(), lc.nn.NGramTokenizer()) if args.words else (None, None)
    options = {"embedding_dim": 128, "context_length": 80, "lr": 1e-3, "weight_decay": 0.1, "mask_same": "text"}
    model = lc.CLIP(lc.nn.SmallConvNet(), tower[0], tokenizer=tower[1], warmup_epochs=args.epochs // 10, **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    callbacks = [lc.ViewAugmentation(policy, seed=args.seed)]
    L.Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=callbacks, **quiet).fit(model, datamodule=data)
    results = {
        "new scenes of things seen in training": scores(model, policy, unseen_scenes, "train", 512),
        "scenes of unseen things": scores(model, policy, data, "val", 512),
        "chance": {"text": 0.25, "image": 0.25, "group": 1 / 6},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    name, text = "words" if args.words else "bytes", json.dumps(results, indent=1)
    (args.output / f"{name}_{args.seed}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
