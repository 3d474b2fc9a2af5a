"""The service: its answers, limits, batches, metrics and end."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from lightning_contrast.serving import Embedder, Limits, create_app, open_embedder, serve
from tests.served_models import SPEC, encoded, expected, image_model, picture, towers
from tests.tolerances import FORMULA, NETWORK, f32, near


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(image_model(), threads=1)) as made:
        yield made


@pytest.fixture(scope="module")
def text_client():
    with TestClient(create_app(towers()[0], threads=1)) as made:
        yield made


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def vector(seed):
    return expected(pixels(picture(seed)))


def error(answer):
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    return answer.status_code, answer.json()["error"]["code"]


def test_similarity_is_the_cosine(client):
    answer = client.post("/similarity", files={"first": encoded(picture(1)), "second": encoded(picture(2))})
    a, b = vector(1), vector(2)
    assert answer.json()["cosine"] == near(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), NETWORK)
    same = client.post("/similarity", files={"first": encoded(picture(1)), "second": encoded(picture(1), "BMP")})
    assert same.json()["cosine"] == near(1.0, FORMULA)
    assert same.json()["cosine"] <= 1


def test_a_batch_is_in_order(client):
    files = [("images", encoded(picture(seed))) for seed in range(9)]
    answer = client.post("/embed/batch", files=files).json()
    wanted = torch.tensor(np.stack([vector(seed) for seed in range(9)]))
    torch.testing.assert_close(torch.tensor(answer["embeddings"]), wanted, **f32(NETWORK))
    assert answer["model"] == client.get("/model").json()["model"]


def test_the_refused_image_of_a_batch_is_named(client):
    files = [("images", encoded(picture())), ("images", b"nothing")]
    answer = client.post("/embed/batch", files=files)
    assert error(answer) == (415, "not_an_image")
    assert answer.json()["error"]["field"] == "images.1"


@pytest.mark.filterwarnings("ignore:1 of [12] texts are longer")  # in the thread of the service
def test_texts(text_client):
    model = towers()[1]
    texts = ["a cat", "two dogs and much more, longer than its context length of forty tokens"]
    with pytest.warns(UserWarning, match="were cut"), torch.no_grad():
        wanted = model.encode_text(texts)
    answer = text_client.post("/embed/text", json={"texts": texts}).json()
    torch.testing.assert_close(torch.tensor(answer["embeddings"]), wanted, **f32(NETWORK))
    image = expected(pixels(picture()), towers()[0] / "image.onnx")
    pair = text_client.post("/similarity/text", files={"image": encoded(picture())}, data={"text": "a cat"})
    assert pair.json()["cosine"] == near(float(image @ wanted[0].numpy()), NETWORK)


@pytest.mark.parametrize("texts", [[], [" "], ["a", ""], ["x" * 2001], ["a"] * 257, "a cat", [3]])
def test_texts_that_are_refused(text_client, texts):
    assert text_client.post("/embed/text", json={"texts": texts}).status_code == 422


def test_as_many_texts_as_the_limit_are_answered(text_client):
    answer = text_client.post("/embed/text", json={"texts": ["a cat"] * 256})
    assert answer.status_code == 200
    assert len(answer.json()["embeddings"]) == 256


def test_half_a_surrogate_pair_is_refused(text_client):
    content = b'{"texts": ["\\ud83d"]}'
    answer = text_client.post("/embed/text", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422


def test_a_model_of_images_has_no_texts(client):
    assert error(client.post("/embed/text", json={"texts": ["a"]})) == (404, "not_found")
    assert "/embed/text" not in client.get("/openapi.json").json()["paths"]


def test_errors_are_structured(client):
    assert error(client.get("/nowhere")) == (404, "not_found")
    answer = client.get("/embed")
    assert error(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert error(client.post("/embed")) == (422, "invalid_request")
    assert error(client.post("/embed", data={"image": "text"})) == (422, "invalid_request")
    bad = {"content-type": "multipart/form-data; boundary=x"}
    assert error(client.post("/embed", content=b"--x\r\nbroken", headers=bad))[0] in (400, 422)


def test_limits_of_bodies(tmp_path):
    limits = Limits(max_bytes=1000, max_body=9000, max_images=2)
    with TestClient(create_app(image_model(), limits=limits)) as client:
        small = encoded(picture(size=(9, 9)))
        assert client.post("/embed", files={"image": small}).status_code == 200
        assert error(client.post("/embed", files={"image": b"x" * 1001})) == (413, "file_too_large")
        assert error(client.post("/embed/batch", files=[("images", small)] * 3)) == (413, "too_many_images")
        assert error(client.post("/embed", files={"image": b"x" * 9000})) == (413, "body_too_large")

        def endless():
            yield b"--x\r\ncontent-disposition: form-data; name=image; filename=x\r\n\r\n"
            for number in range(100):
                read.append(number)
                yield b"x" * 1000

        read = []
        headers = {"content-type": "multipart/form-data; boundary=x"}  # and no content-length
        assert error(client.post("/embed", content=endless(), headers=headers)) == (413, "body_too_large")


def slow_embedder(seconds):
    def run(images):
        time.sleep(seconds)
        return images.flatten(1)[:, :4].numpy()

    return Embedder(run, {"size": 2, "mean": None, "std": None}, model_digest="0")


@pytest.mark.slow
def test_limit_of_time():
    app = create_app(slow_embedder(0.6), limits=Limits(seconds=0.2))
    with TestClient(app) as client:
        answer = client.post("/embed", files={"image": encoded(picture())})
        assert error(answer) == (503, "too_slow")
        assert answer.headers["retry-after"] == "1"


@pytest.mark.slow
def test_too_many_at_once_are_refused():
    app = create_app(slow_embedder(0.3), limits=Limits(max_waiting=3, max_images=3))
    with TestClient(app) as client:
        files = [("images", encoded(picture()))] * 3
        answers = []
        first = threading.Thread(target=lambda: answers.append(client.post("/embed/batch", files=files)))
        first.start()
        time.sleep(0.15)
        answers.append(client.post("/embed", files={"image": encoded(picture())}))
        first.join()
        assert error(answers[0]) == (503, "busy")
        assert answers[1].status_code == 200
        assert client.post("/embed", files={"image": encoded(picture())}).status_code == 200


def test_as_many_images_as_the_limit_are_answered(tmp_path):
    files = [("images", encoded(picture()))] * 3
    with TestClient(create_app(slow_embedder(0), limits=Limits(max_waiting=1, max_images=3))) as client:
        assert client.post("/embed/batch", files=files).status_code == 200


@pytest.mark.slow
def test_requests_share_a_batch(client):
    app = create_app(image_model(), max_delay=0.3, max_batch=8)
    with TestClient(app) as client:
        found = {}

        def ask(seed):
            found[seed] = client.post("/embed", files={"image": encoded(picture(seed))}).json()["embedding"]

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted = torch.tensor(np.stack([vector(seed) for seed in range(8)]))
        torch.testing.assert_close(torch.tensor([found[seed] for seed in range(8)]), wanted, **f32(NETWORK))
        batches = re.search(r"^batch_size_count (\d+)", client.get("/metrics").text, flags=re.M)[1]
        assert int(batches) <= 4


def test_metrics_count_requests(client):
    def counted(status):
        name = f'http_requests_total{{path="/embed",status="{status}"}} '
        found = re.search(f"^{re.escape(name)}(.*)$", client.get("/metrics").text, flags=re.M)
        return float(found[1]) if found else 0.0

    before = counted(200), counted(415)
    client.post("/embed", files={"image": encoded(picture())})
    client.post("/embed", files={"image": b"nothing"})
    assert (counted(200), counted(415)) == (before[0] + 1, before[1] + 1)
    client.get("/one")
    assert "/one" not in client.get("/metrics").text  # no label for each address that somebody tries


def test_an_error_of_the_model_is_an_answer():
    def run(images):
        if float(images.max()) > 0.9:
            raise RuntimeError("secret detail")
        return images.flatten(1)[:, :4].numpy()

    embedder = Embedder(run, {"size": 2, "mean": None, "std": None}, model_digest="0")
    with TestClient(create_app(embedder), raise_server_exceptions=False) as client:
        white = encoded(picture().point(lambda value: 255))
        answer = client.post("/embed", files={"image": white})
        assert error(answer) == (500, "internal_error")
        assert "secret" not in answer.text
        assert client.post("/embed", files={"image": encoded(picture().point(lambda value: 9))}).status_code == 200


def test_vectors_of_zeros_have_no_cosine():
    embedder = Embedder(
        lambda images: images.flatten(1)[:, :4].numpy(), {"size": 2, "mean": None, "std": None}, model_digest="0"
    )
    black, gray = (encoded(picture().point(lambda value, shade=shade: shade)) for shade in (0, 99))
    with TestClient(create_app(embedder)) as client:
        assert error(client.post("/similarity", files={"first": gray, "second": black})) == (422, "zero_vector")


def test_no_file_of_the_name_is_written(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stolen.png", "../stolen.png", str(tmp_path / "stolen.png"), "a\x00b", "C:\\x"):
        assert client.post("/embed", files={"image": (name, encoded(picture()))}).status_code == 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_schema_is_kept():
    """Requests by the OpenAPI schema, valid and not: only documented statuses, types and bodies, and no failure."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi import checks

    app = create_app(towers()[0], threads=1)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    wanted = [schemathesis.checks.not_a_server_error, checks.status_code_conformance]
    wanted += [checks.content_type_conformance, checks.response_schema_conformance]
    bounded = {"max_examples": 10, "deadline": None, "database": None, "derandomize": True}
    asked = []

    def ask(case):
        asked.append(case.operation.label)
        case.call_and_validate(checks=wanted)

    for operation in schema.get_all_operations():
        settings(**bounded, suppress_health_check=list(HealthCheck))(given(operation.ok().as_strategy())(ask))()
    assert len(set(asked)) == 8


@pytest.mark.slow
@pytest.mark.dist
def test_it_listens_on_this_machine_alone_and_stops_gracefully(tmp_path):
    """As a process: a request that is at work when SIGTERM arrives still gets its answer."""
    source = """
import time
from lightning_contrast.serving import Embedder, create_app, serve
def run(images):
    time.sleep(1.0)
    return images.flatten(1)[:, :4].numpy()
embedder = Embedder(run, {"size": 2, "mean": None, "std": None}, model_digest="0")
serve(create_app(embedder), port=0)
"""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", source], stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not lines or "startup complete" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        address = re.search(r"http://([\d.]+):(\d+)", "".join(lines))
        assert address[1] == "127.0.0.1"
        head = b"--x\r\ncontent-disposition: form-data; name=image; filename=x\r\n\r\n"
        request = urllib.request.Request(f"{address[0]}/embed", head + encoded(picture()) + b"\r\n--x--\r\n")
        request.add_header("content-type", "multipart/form-data; boundary=x")
        answers = []
        asking = threading.Thread(target=lambda: answers.append(urllib.request.urlopen(request, timeout=30).status))
        asking.start()
        time.sleep(0.5)
        process.terminate()
        asking.join()
        assert answers == [200]
        assert process.wait(30) == -signal.SIGTERM  # ends by the signal after its last answer
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.parametrize(("host", "reason"), [("198.51.100.7", "Cannot assign"), ("x" * 70, "label"), (None, "in use")])
def test_an_address_that_is_not_free_or_not_ours_is_named(host, reason):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = 0 if host else taken.getsockname()[1]
        name = f"Cannot listen on host '{host or '127.0.0.1'}', port {port}: .*{reason}[^(]*. Give an address"
        with pytest.raises(OSError, match=name):
            serve(None, host=host or "127.0.0.1", port=port)
    with pytest.raises(ValueError, match=r"`port` must lie in 0\.\.65535, got 65536"):
        serve(None, port=65536)


@pytest.mark.parametrize(("host", "address"), [("localhost", "127.0.0.1"), ("127.0.0.2",) * 2, ("", "0.0.0.0")])
def test_who_can_reach_it_is_said(host, address, monkeypatch, caplog):
    import uvicorn

    def run(server, sockets):
        found.extend(listener.getsockname()[0] for listener in sockets)

    found = []
    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve(None, host=host, port=0)
    assert found == [address]
    assert ("Listening on 0.0.0.0: other machines can reach" in caplog.text) == (address == "0.0.0.0")


def test_models_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model"):
        create_app(tmp_path / "missing.onnx")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ValueError, match=r"model.*file"):
        create_app(tmp_path / "text.txt")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(ValueError, match="ONNX graph"):
        create_app(tmp_path / "broken.onnx")
    with pytest.raises(ValueError, match="max_batch"):
        create_app(image_model(), max_batch=0)
    with pytest.raises(ValueError, match="max_pixels"):
        Limits(max_pixels=0)
    with pytest.raises(ValueError, match="one vector per image"):
        Embedder(lambda images: images.numpy(), SPEC, model_digest="0")
    with pytest.raises(ValueError, match="scale"):
        Embedder(lambda images: images.flatten(1).numpy(), SPEC | {"scale": [0, 65535]}, model_digest="0")
    spec = SPEC | {"mean": [0.5] * 4, "std": [0.5] * 4}
    with pytest.raises(ValueError, match="channels"):
        Embedder(lambda images: images.flatten(1).numpy(), spec, model_digest="0")
    with pytest.raises(TypeError, match="path or a module"):
        open_embedder(3)


def test_a_missing_extra_is_named(monkeypatch):
    from lightning_contrast.serving import app

    monkeypatch.setattr(app, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ModuleNotFoundError, match=r"needs uvicorn: pip install 'lightning_contrast\[serve\]'"):
        create_app(image_model())
