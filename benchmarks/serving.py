"""The similarity service under load on loopback: p50 and p99 of a request, images/s, and those of the bare session.

Clients are threads of another process on the same machine, each with one image per request and the next after its
answer. Without ``--models`` a ResNet-50 with random weights is exported, and made int8 by ONNX Runtime (static, per
channel, calibrated on the images of the requests).
"""

import argparse
import http.client
import io
import json
import multiprocessing
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGES, EDGE = 32, 256


def jpegs() -> list[bytes]:
    found = []
    for seed in range(IMAGES):
        noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def make_models(folder: Path) -> dict[str, Path]:
    import timm

    from lightning_contrast.export import export
    from lightning_contrast.serving import decode_image

    spec = {"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    torch.manual_seed(0)
    network = timm.create_model("resnet50", num_classes=0, zero_init_last=False)
    floats = export(network, folder / "float.onnx", format="onnx", input_spec=spec)
    images = torch.stack([decode_image(data) for data in jpegs()])
    # Random weights: what int8 changes in them says nothing, so any change is accepted.
    options = {"data": images, "images": 8, "calibration_images": 24, "tolerance": 1.0}
    return {
        "float": floats,
        "int8": export(network, folder / "int8.onnx", format="onnx-int8", input_spec=spec, **options),
    }


def client(port: int, clients: int, seconds: float, answers: "multiprocessing.Queue[Any]") -> None:
    """Put the times of all requests and the seconds until the last answer, or the text of an error of a thread."""
    images = jpegs()
    begin = time.perf_counter()
    end = begin + seconds

    def ask(place: int) -> list[float]:
        times = []
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        head = b"--x\r\ncontent-disposition: form-data; name=image; filename=x\r\n\r\n"
        while time.perf_counter() < end:
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

    try:
        with ThreadPoolExecutor(clients) as pool:
            times = [each for found in pool.map(ask, range(clients)) for each in found]
        answers.put((times, time.perf_counter() - begin))
    except Exception as error:  # noqa: BLE001  # is that of the row
        answers.put(repr(error))


def measure(path: Path, clients: list[int], seconds: float, threads: int) -> dict[str, object]:
    import uvicorn

    from lightning_contrast.serving import create_app, decode_image, open_embedder

    embedder = open_embedder(path, threads=threads)
    images = [embedder.prepare(decode_image(data)) for data in jpegs()]
    found: dict[str, object] = {"MB": round(path.stat().st_size / 1e6, 1)}
    for size in (1, 8):
        embedder.embed_prepared(images[:size])
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            embedder.embed_prepared(images[:size])
            count += size
        found[f"bare session, batch {size}: images/s"] = round(count / (time.perf_counter() - start), 1)
    server = uvicorn.Server(uvicorn.Config(create_app(embedder), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        for count in clients:
            found[f"{count} clients"] = row_of(port, count, seconds)
    finally:
        server.should_exit = True
        thread.join()
    return found


def row_of(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Return the times of requests of clients in a process of their own, and images/s up to the last answer."""
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[Any] = context.Queue()
    process = context.Process(target=client, args=(port, clients, seconds, answers))
    process.start()
    answer = answers.get(timeout=seconds + 300)
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(f"A client failed: {answer}")
    times, taken = answer
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    row = {"p50 ms": round(float(p50), 1), "p99 ms": round(float(p99), 1)}
    return row | {"images/s": round(len(times) / taken, 1), "requests": len(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], help="NAME=PATH of ONNX graphs")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/serving.jsonl"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        given = dict(model.split("=", 1) for model in args.models)
        for name, path in (given or make_models(Path(folder))).items():
            row = {"model": name} | measure(Path(path), args.clients, args.seconds, args.threads)
            print(json.dumps(row), flush=True)
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
