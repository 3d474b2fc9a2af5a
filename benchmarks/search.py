"""Image search with 100,000 vectors: recall@10 against the exact search, queries/s, size on disk; other stores.

The vectors lie around random centers, as those of a trained model around its classes; queries are new vectors of the
same kind. Truth is a product of all vectors in torch.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

K = 10


def vectors(count: int, dim: int, seed: int) -> torch.Tensor:
    centers = F.normalize(torch.randn(1000, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(0, len(centers), (count,), generator=generator)
    return F.normalize(centers[place] + torch.randn(count, dim, generator=generator) * 0.7 / dim**0.5, dim=1)


def judged(name: str, search: Callable[[torch.Tensor], list[int]], queries: torch.Tensor, truth: torch.Tensor) -> None:
    search(queries[0])
    start = time.perf_counter()
    found = [search(query) for query in queries]
    seconds = time.perf_counter() - start
    hits = [len(set(mine) & set(right)) for mine, right in zip(found, truth.tolist(), strict=True)]
    row = {"search": name, f"recall@{K}": round(sum(hits) / (K * len(hits)), 4)}
    print(json.dumps(row | {"queries/s": round(len(queries) / seconds, 1)}), flush=True)


def lance(stored: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor) -> None:
    from lightning_contrast.search.store import VectorTable

    with tempfile.TemporaryDirectory() as folder:
        table = VectorTable(Path(folder) / "store", {}, stored.shape[1])
        facts = {"folder": ".", "digest": "0" * 32, "bytes": 0, "changed_ns": 0, "width": 1, "height": 1}
        start = time.perf_counter()
        for first in range(0, len(stored), 1000):
            rows = [{"path": f"{row:07}"} | facts for row in range(first, min(first + 1000, len(stored)))]
            table.put(rows, stored[first : first + 1000].numpy(), replace=False)
        written = time.perf_counter() - start
        table.compact()

        def megabytes() -> float:
            return round(table.size_on_disk() / 1e6, 1)

        sizes = {"raw MB": round(stored.numel() * 4 / 1e6, 1), "MB after compaction": megabytes()}

        def search(query: torch.Tensor, probes: int | None = None) -> list[int]:
            return [int(row["path"]) for row in table.nearest(query.numpy(), K, None, probes)]

        judged("LanceDB, exact", search, queries[:50], truth[:50])
        start = time.perf_counter()
        table.build_index(num_partitions=round(len(stored) ** 0.5))
        built = time.perf_counter() - start
        for probes in (1, 4, 10, 20, 40):
            judged(f"LanceDB, probes={probes}", lambda query, n=probes: search(query, n), queries, truth)
        sizes |= {"MB with the index": megabytes()}
        print(json.dumps({"LanceDB: write s": round(written, 1), "build s": round(built, 1)} | sizes), flush=True)


def faiss_lists(stored: torch.Tensor, queries: torch.Tensor, truth: torch.Tensor) -> None:
    try:
        import faiss
    except ImportError:
        print(json.dumps({"faiss": "not installed"}), flush=True)
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    start = time.perf_counter()
    quantizer = faiss.IndexFlatIP(stored.shape[1])
    index = faiss.IndexIVFFlat(quantizer, stored.shape[1], round(len(stored) ** 0.5), faiss.METRIC_INNER_PRODUCT)
    index.train(stored.numpy())
    index.add(stored.numpy())
    print(json.dumps({"faiss: build s": round(time.perf_counter() - start, 1)}), flush=True)
    for probes in (1, 4, 10, 20, 40):
        index.nprobe = probes
        search = lambda query: index.search(query.numpy()[None], K)[1][0].tolist()  # noqa: E731
        judged(f"faiss IVF, probes={probes}", search, queries, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option, number in (("vectors", 100_000), ("dim", 256), ("queries", 300)):
        parser.add_argument(f"--{option}", type=int, default=number)
    args = parser.parse_args()
    stored, queries = vectors(args.vectors, args.dim, 1), vectors(args.queries, args.dim, 2)
    truth = torch.cat([(part @ stored.T).topk(K).indices for part in queries.split(50)])
    judged("torch, exact", lambda query: (stored @ query).topk(K).indices.tolist(), queries, truth)
    lance(stored, queries, truth)
    faiss_lists(stored, queries, truth)
    print(json.dumps({"numpy": np.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
