"""The clients of `benchmarks.serving` against a service of a known speed."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import serving


@pytest.fixture
def slow():
    """Return a server that answers after 0.2 s."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(0.2)
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *arguments):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status = 200
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_images_per_second_are_those_up_to_the_last_answer(slow):
    row = serving.row_of([serving.with_processor_time(lambda: serving.client(slow.server_port, 2, 0.01))])
    assert row["requests"] == 2
    assert 0 < row["images/s"] <= 10  # each takes 0.2 s or more


@pytest.mark.slow
def test_a_failed_request_fails_the_row(slow):
    slow.status = 503
    with pytest.raises(RuntimeError, match="status 503"):
        serving.client(slow.server_port, 2, 0.01)


def test_rounds_are_joined():
    row = serving.row_of([([0.1, 0.1], 1.0, 0.6), ([0.3], 2.0, 0.6)], images=8)
    assert row == {"p50 ms": 100.0, "p99 ms": 296.0, "images/s": 8.0, "CPU ms / image": 50.0, "requests": 3}
