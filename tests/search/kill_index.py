"""A program that kills updates of an index (SIGKILL) at random moments: ``python -m tests.search.kill_index``.

Every try starts from an empty store. After each kill the index must open, hold whole commits only, of vectors that are
those of the files, and the next update must complete it.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_contrast.search import ImageIndex
from lightning_contrast.serving import Embedder
from tests.served_models import picture
from tests.tolerances import FORMULA, f32

BATCH = 8
CHILD = """
import sys
from tests.search.kill_index import embedder
from lightning_contrast.search import ImageIndex
import lancedb
model = embedder()
print("ready", flush=True)
sys.stdin.readline()
ImageIndex(sys.argv[1], model, sys.argv[2]).update(batch_size=8)
print("done", flush=True)
"""


def embedder():
    """Return a model whose vector is the image itself, small."""
    return Embedder(lambda images: images.flatten(1).numpy(), {"size": 4, "mean": None, "std": None}, model_digest="0")


def make_images(folder, count):
    """Write images, a few of them in a folder below."""
    (folder / "more").mkdir(parents=True)
    for number in range(count):
        picture(number, (9, 9)).save(folder / ("more" if number % 5 == 0 else "") / f"{number:04}.png")


def check(store, folder):
    """Raise unless all rows of an index are right; return their number, or None where there is no index yet."""
    try:
        index = ImageIndex(store)
    except FileNotFoundError:
        return None
    paths, vectors = index.stored_vectors()
    assert len(set(paths)) == len(paths), "a path twice"
    model = embedder()
    for path, vector in zip(paths, vectors, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(folder / path))).permute(2, 0, 1)
        wanted = model.embed_images([pixels])[0]
        torch.testing.assert_close(vector, torch.from_numpy(wanted / np.linalg.norm(wanted)), **f32(FORMULA))
    return len(paths)


def kill_once(work, folder, seconds, seed):
    """Kill an update; return how many rows were kept (None: no index yet), and whether it had ended."""
    store = work / "store"
    shutil.rmtree(store, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(store), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(random.Random(seed).uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        ended = "done" in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    kept = check(store, folder)
    index = ImageIndex(store, embedder(), folder)
    done = index.update()
    total = len(list(folder.rglob("*.png")))
    assert (len(index), len(done.added) + (kept or 0)) == (total, total)
    assert check(store, folder) == total
    return kept, ended


def run(tries, count, seed, seconds=None):
    """Kill updates; return what was kept by each.

    Args:
        tries: Number of kills.
        count: Number of images.
        seed: Seed of the moments.
        seconds: Latest moment after the start; None: the time of a whole update.
    """
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        make_images(folder, count)
        if seconds is None:
            start = time.perf_counter()
            ImageIndex(Path(name) / "first", embedder(), folder).update(batch_size=BATCH)
            seconds = time.perf_counter() - start
        for number in range(tries):
            found.append(kill_once(Path(name), folder, seconds, seed + number))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, value in (("tries", 20), ("images", 400), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=value)
    args = parser.parse_args()
    results = run(args.tries, args.images, args.seed)
    print("images kept after each kill, of", args.images, ":", [kept for kept, _ in results])
    print(f"{len(results)} of {args.tries} survived; {sum(ended for _, ended in results)} had ended before the kill")
