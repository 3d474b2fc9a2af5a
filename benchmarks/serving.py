"""The similarity service under load on loopback: p50 and p99 of a request, images/s, and those of the bare session.

Clients are threads of another process on the same machine, each with one image per request and the next after its
answer. Networks have random weights; int8 is that of `export` (static, per channel, calibrated on images of the
requests). Float and int8 are measured in turn, round after round.
"""

import argparse
import http.client
import io
import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import report

IMAGES, EDGE = 32, 256
NETWORKS = {"small_convnet": 32, "resnet18": 224, "resnet50": 224}
"""Size of the images of each network."""
BATCHES = (1, 8)
Times = tuple[list[float], float]
"""Seconds of each request, and those from the first request to the last answer."""
Round = tuple[list[float], float, float]
"""`Times`, and the processor time of the model or service in seconds, of all its threads."""


def jpegs() -> list[bytes]:
    found = []
    for seed in range(IMAGES):
        noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def make_models(name: str, folder: Path) -> dict[str, Path]:
    """Return the graphs of a network by their weights; those that are in the folder are kept."""
    from lightning_contrast.export import export
    from lightning_contrast.nn import build_backbone
    from lightning_contrast.serving import decode_image

    spec = {"size": NETWORKS[name], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    torch.manual_seed(0)
    options = {"zero_init_last": False} if name.startswith("resnet") else {}
    network = build_backbone(name, backbone_kwargs=options).module
    images = torch.stack([decode_image(data) for data in jpegs()])
    # Random weights: what int8 changes in them says nothing, so any change is accepted.
    calibrated = {"data": images, "images": 8, "calibration_images": 24, "tolerance": 1.0}
    paths = {weights: folder / f"{name}.{weights}.onnx" for weights in ("float", "int8")}
    for weights, path in paths.items():
        if not path.exists():
            is_int8 = weights == "int8"
            start = time.perf_counter()
            settings: dict[str, Any] = {"format": "onnx-int8"} | calibrated if is_int8 else {"format": "onnx"}
            export(network, path, input_spec=spec, **settings)
            print(f"{path.name}: exported in {time.perf_counter() - start:.0f} s", flush=True)
    return paths


def client(port: int, clients: int, seconds: float) -> Times:
    """Return the times of the requests of threads, at least one of each; a status other than 200 is an error."""
    images = jpegs()
    begin = time.perf_counter()
    end = begin + seconds

    def ask(place: int) -> list[float]:
        times: list[float] = []
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        head = b"--x\r\ncontent-disposition: form-data; name=image; filename=x\r\n\r\n"
        while not times or time.perf_counter() < end:
            place = (place + 1) % len(images)
            start = time.perf_counter()
            body = head + images[place] + b"\r\n--x--\r\n"
            connection.request("POST", "/embed", body, {"content-type": "multipart/form-data; boundary=x"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"The service answered with status {answer.status}.")
            times.append(time.perf_counter() - start)
        return times

    with ThreadPoolExecutor(clients) as pool:
        times = [each for found in pool.map(ask, range(clients)) for each in found]
    return times, time.perf_counter() - begin


def bare(embedder: Any, images: list[torch.Tensor], seconds: float) -> Times:
    """Return the times of batches of the model alone, of images that are decoded and prepared."""
    begin, times = time.perf_counter(), []
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        embedder.embed_prepared(images)
        times.append(time.perf_counter() - start)
    return times, time.perf_counter() - begin


@contextmanager
def served(embedder: Any) -> Iterator[int]:
    """Serve a model, and give the port."""
    import uvicorn

    from lightning_contrast.serving import Limits, create_app

    app = create_app(embedder, limits=Limits(seconds=600))  # none is refused on a busy machine
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def with_processor_time(work: Callable[[], Times]) -> Round:
    """Return the times of work, and the processor time that this process took in the meantime."""
    start = time.process_time()
    times, taken = work()
    return times, taken, time.process_time() - start


def row_of(rounds: Iterable[Round], images: int = 1) -> dict[str, Any]:
    """Return the percentiles of all requests, images/s up to the last answers, and processor time per image.

    Args:
        rounds: The rounds.
        images: Images of a request.
    """
    found = list(rounds)
    times = [each for part, _, _ in found for each in part]
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    count = images * len(times)
    return {
        "p50 ms": round(float(p50), 2),
        "p99 ms": round(float(p99), 2),
        "images/s": round(count / sum(taken for _, taken, _ in found), 1),
        "CPU ms / image": round(1000 * sum(used for _, _, used in found) / count, 2),
        "requests": len(times),
    }


def measure(name: str, paths: dict[str, Path], clients: list[int], seconds: float, rounds: int, threads: int) -> Any:
    """Return the rows of a network."""
    from lightning_contrast.serving import decode_image, open_embedder

    found: dict[tuple[str, str, int], list[Round]] = {}
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        process = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))  # of the clients
        process.submit(jpegs).result()
        models = {weights: open_embedder(path, threads=threads) for weights, path in paths.items()}
        ports = {weights: stack.enter_context(served(model)) for weights, model in models.items()}
        first = next(iter(models.values()))
        prepared = [first.prepare(decode_image(data)) for data in jpegs()[: max(BATCHES)]]
        for model, size in itertools.product(models.values(), BATCHES):
            model.embed_prepared(prepared[:size])
        for _ in range(rounds):
            for size in BATCHES:
                for weights, model in models.items():
                    key = (f"bare session, batch {size}", weights, size)
                    found.setdefault(key, []).append(
                        with_processor_time(lambda model=model, batch=prepared[:size]: bare(model, batch, seconds))
                    )
            for count in clients:
                for weights, port in ports.items():
                    key = (f"service, {count} client{'s' * (count > 1)}", weights, 1)
                    found.setdefault(key, []).append(
                        with_processor_time(lambda job=(client, port, count, seconds): process.submit(*job).result())
                    )
    size_of = {weights: round(path.stat().st_size / 1e6, 1) for weights, path in paths.items()}
    return [
        {"network": name, "load": load, "weights": weights, "MB": size_of[weights]} | row_of(times, size)
        for (load, weights, size), times in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--folder", type=Path, help="where the graphs are kept; default: nowhere")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=3, help="of a load in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            paths = make_models(name, args.folder or Path(folder))
            rows += measure(name, paths, args.clients, args.seconds, args.rounds, args.threads)
    notes = (
        f"`create_app` on loopback: JPEGs of {EDGE} x {EDGE} pixels, one per request, of clients in another process on "
        f"the same cores, which send the next one after the answer; decoding and resizing are part of a request. The "
        f"bare session runs batches of prepared images. {args.threads} threads of ONNX Runtime, random weights, "
        f"{NETWORKS['resnet50']} x {NETWORKS['resnet50']} pixels ({NETWORKS['small_convnet']} x "
        f"{NETWORKS['small_convnet']} for small_convnet). Float and int8 in turn, {args.rounds} rounds of "
        f"{args.seconds:g} s for each row. CPU ms are those of all threads of the model or of the service, without the "
        "clients; threads of ONNX Runtime that wait for each other are counted."
        f" The load average before this run was {load:.1f} on {os.cpu_count()} cores: where it is above a few tenths, "
        "compare CPU ms and not times."
    )
    report("serving", rows, notes)


if __name__ == "__main__":
    main()
