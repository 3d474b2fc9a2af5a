"""Search one artist's emoji by words and by the other artist's pictures, with a CLIP trained on the other artist."""

import argparse
import re
from pathlib import Path

from clip_emoji import train  # the example next to this one
from PIL import Image

import lightning_contrast as lc


def write_images(data: lc.data.EmojiDataModule, folder: Path) -> None:
    """Write the emoji of the artist that is searched, named by captions, in folders of "seen" and "unseen" things."""
    noto, captions = data.artists("train")[0], data.captions("train")
    unseen, names = data.artists("val")[0], data.captions("val")[: len(data.things("val"))]
    for part, images, words in (("seen", noto, captions), ("unseen", unseen, names)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for image, caption in zip(images, words, strict=True):
            name = re.sub(r"[^\w -]+", "", caption)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / part / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", nargs="+", default=["cat", "red heart", "fruit"])
    parser.add_argument("--output", type=Path, default=Path("runs/search_emoji"))
    parser.add_argument("--page", action="store_true", help="serve the page on this machine, port 8000")
    args = parser.parse_args()
    data = lc.data.EmojiDataModule(128, captions=True, artist="fluent", seed=args.seed)
    model, _ = train("CLIP", data, epochs=args.epochs, seed=args.seed)
    write_images(data, args.output / "images")
    index = lc.search.ImageIndex(args.output / f"store_{args.seed}_{args.epochs}", model, args.output / "images")
    done = index.update()
    print(f"{len(index)} images, {len(done.added)} added")
    for words in args.words:
        print(f"{words}:", ", ".join(f"{hit.path} {hit.score:.2f}" for hit in index.search(words, 5)))
    pictures, names = data.artists("train")[1], data.captions("train")
    for place in (part * len(pictures) // 3 for part in range(3)):
        hits = index.search(pictures[place], 5, where="folder = 'seen'")
        print(f"picture of {names[place]}:", ", ".join(f"{hit.path} {hit.score:.2f}" for hit in hits))
    found = index.near_duplicates(0.99)
    print(f"near duplicates: {len(found)} groups, the smallest:", found[-1:])
    if args.page:
        lc.serving.serve(lc.search.create_search_app(index))
