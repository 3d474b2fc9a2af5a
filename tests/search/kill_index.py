"""A program that kills updates of an index (SIGKILL) at random moments: ``python -m tests.search.kill_index``.

Every try starts from an empty store, and the kill follows a drawn number of commits. After each kill the index must
open, hold whole commits only, among them all that were seen, of vectors that are those of the files, and the next
update must complete it. ``--faiss`` kills programs that save a FAISS index (``pip install faiss-cpu``) instead.
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
from lightning_contrast.search import ImageIndex
from lightning_contrast.search.store import VectorTable
from tests.search.kill_index import BATCH, embedder
import lancedb
put, commits = VectorTable.put, 0
def counted(*arguments, **options):
    global commits
    put(*arguments, **options)
    commits += 1
    print("commit", flush=True)
    if commits == int(sys.argv[3]):
        sys.stdin.readline()
VectorTable.put = counted
model = embedder()
print("ready", flush=True)
sys.stdin.readline()
ImageIndex(sys.argv[1], model, sys.argv[2]).update(batch_size=BATCH)
print("done", flush=True)
"""
"""Tells of each commit, and waits for the kill after that of a given number, so that none comes after the update."""


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


def kill_once(work, folder, seen, seconds):
    """Kill an update some seconds after a number of its commits was seen; return how many rows were kept.

    None: there was no index yet.
    """
    store = work / "store"
    shutil.rmtree(store, ignore_errors=True)
    total = len(list(folder.rglob("*.png")))
    last = min(seen + 2, -(-total // BATCH))
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(store), str(folder), str(last)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        for _ in range(seen):
            assert process.stdout.readline() == "commit\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        assert "done" not in process.stdout.read(), "the update had ended"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    kept = check(store, folder)
    assert (kept or 0) % BATCH == 0 or kept == total, "a part of a commit"
    assert min(seen * BATCH, total) <= (kept or 0) <= min(last * BATCH, total), "a commit was lost"
    index = ImageIndex(store, embedder(), folder)
    done = index.update()
    assert (len(index), len(done.added) + (kept or 0)) == (total, total)
    assert check(store, folder) == total
    return kept


def run(tries, count, seed, commits=None):
    """Kill updates; return what was kept by each.

    Args:
        tries: Number of kills.
        count: Number of images.
        seed: Seed of the moments.
        commits: Commits before each kill; None: drawn from 0 to all of them.
    """
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        make_images(folder, count)
        start = time.perf_counter()
        ImageIndex(Path(name) / "first", embedder(), folder).update(batch_size=BATCH)
        batches = -(-count // BATCH)
        seconds = (time.perf_counter() - start) / batches
        for number in range(tries):
            draw = random.Random(seed + number)
            seen = draw.randint(0, batches) if commits is None else commits
            found.append(kill_once(Path(name), folder, seen, draw.uniform(0, seconds)))
    return found


SAVER = """
import sys
import faiss
import numpy
index = faiss.IndexFlatIP(256)
rows = numpy.random.default_rng(0).standard_normal((20_000, 256), dtype=numpy.float32)
while True:
    index.add(rows[:20_000 if index.ntotal == 0 else 100])
    faiss.write_index(index, sys.argv[1])
    print(index.ntotal, flush=True)
"""
"""Adds 100 vectors of 20,000 and saves the index, again and again, and tells how many vectors are saved."""


def run_faiss(tries, seed):
    """Kill programs at random moments of a save of a FAISS index; return what the file holds then.

    Args:
        tries: Number of kills.
        seed: Seed of the moments.

    Returns:
        For each kill the vectors that had been saved, and those of the file or the first line of its error.
    """
    import faiss

    found = []
    for number in range(tries):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "vectors.faiss"
            process = subprocess.Popen([sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE, text=True)
            try:
                process.stdout.readline()
                start = time.perf_counter()
                saved = int(process.stdout.readline())
                time.sleep(random.Random(seed + number).uniform(0, time.perf_counter() - start))
                process.send_signal(signal.SIGKILL)
                saved = int((process.stdout.read().split() or [saved])[-1])
            finally:
                process.kill()
                process.wait()
                process.stdout.close()
            try:
                held = faiss.read_index(str(path)).ntotal
            except RuntimeError as error:
                held = str(error).strip().splitlines()[0][-80:]
            found.append((saved, held))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, value in (("tries", 20), ("images", 400), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--faiss", action="store_true", help="kill saves of a FAISS index")
    args = parser.parse_args()
    if args.faiss:
        kept = run_faiss(args.tries, args.seed)
        print(*kept, sep="\n")
        print(f"{sum(isinstance(held, int) for _, held in kept)} of {args.tries} files can be read")
        sys.exit()
    results = run(args.tries, args.images, args.seed)
    print("images kept after each kill, of", args.images, ":", results)
    print(f"{len(results)} of {args.tries} survived a kill in a running update")
