"""A headless Chromium, driven over a pipe with the standard library alone (the Chrome DevTools Protocol)."""

import base64
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time

PACKAGE = "chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--use-angle=swiftshader",  # WebGL without a graphics card: the projector draws with it
    "--enable-unsafe-swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no page reaches beyond this machine
    "--window-size=1400,1000",
    "--remote-debugging-pipe",
)
# The browser reads from 3 and writes to 4; descriptors that `subprocess` passes on keep their numbers.
START = """import os, sys
to, back = (os.dup(int(number)) for number in sys.argv[1:3])
for here, there in ((to, 3), (back, 4)):
    os.dup2(here, there)
    os.set_inheritable(there, True)
os.execv(sys.argv[3], sys.argv[3:])"""
# All text of a page, that in shadow roots and in frames of the same server too.
TEXT = """(() => {
  const found = [];
  const walk = node => {
    if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName)) return;
    if (node.shadowRoot) walk(node.shadowRoot);
    if (node.tagName === 'IFRAME' && node.contentDocument) walk(node.contentDocument);
    for (const child of node.childNodes) {
      if (child.nodeType === 3) found.push(child.textContent); else walk(child);
    }
  };
  walk(document);
  return found.join(' ').replace(/\\s+/g, ' ');
})()"""
# Width and height of each picture that has been loaded, by its address.
PICTURES = """(() => {
  const found = [];
  const walk = node => {
    if (node.shadowRoot) walk(node.shadowRoot);
    if (node.tagName === 'IFRAME' && node.contentDocument) walk(node.contentDocument);
    if (node.tagName === 'IMG' && node.complete) found.push([node.src, node.naturalWidth, node.naturalHeight]);
    for (const child of node.childNodes) walk(child);
  };
  walk(document);
  return found;
})()"""


def find_chromium():
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chromium:
    """One tab of a browser with a profile of its own; a context manager.

    Attributes:
        responses: Status by address of everything that the tab was sent.
        failures: Errors that scripts of the page left uncaught.
    """

    def __init__(self, folder):
        self.responses, self.failures = {}, []
        self._answers, self._number = {}, 0
        self._arrived = queue.Queue()
        their_input, self._to = os.pipe()
        self._from, their_output = os.pipe()
        browser = [find_chromium(), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        start = [sys.executable, "-S", "-c", START, str(their_input), str(their_output)]
        with open(folder / "chromium.log", "wb") as log:
            self._process = subprocess.Popen(
                [*start, *browser],
                pass_fds=(their_input, their_output),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(their_input)
        os.close(their_output)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self):
        try:
            target = self._send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime"):
                self._send(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError, TimeoutError):
            self._send("Browser.close", session=False, seconds=10)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)  # the browser and the processes that it has started
            self._process.wait()
        self._reader.join(10)
        os.close(self._to)

    def open(self, address):
        """Go to a page."""
        self._send("Page.navigate", url=address)

    def evaluate(self, script):
        """Return the value of a JavaScript expression in the page."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def wait_for(self, condition, what, seconds=120):
        """Return the first true value of a function, or fail with what the page shows."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._take_events()
            found = condition()
            if found:
                return found
            time.sleep(0.5)
        raise AssertionError(f"no {what} within {seconds} s; the page says: {self.text()[:2000]}; {self.responses}")

    def text(self):
        """Return the text of the page."""
        return self.evaluate(TEXT) or ""

    def pictures(self):
        """Return (address, width, height) of each picture of the page."""
        return self.evaluate(PICTURES) or []

    def screenshot(self, path):
        """Write what the tab shows as a PNG file."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def _send(self, method, session=True, seconds=120, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session and hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while self._number not in self._answers:
            self._take_events(deadline - time.monotonic())
        answer = self._answers.pop(self._number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _take_events(self, seconds=None):
        """Sort what has arrived; with a number of seconds, wait for one message at least."""
        try:
            message = self._arrived.get(timeout=seconds) if seconds is not None else self._arrived.get_nowait()
        except queue.Empty:
            if seconds is not None:
                raise TimeoutError("the browser does not answer") from None
            return
        except ValueError:
            raise TimeoutError("the browser does not answer") from None
        while message is not None:
            self._sort(message)
            try:
                message = self._arrived.get_nowait()
            except queue.Empty:
                return
        raise OSError("the browser has ended")

    def _sort(self, message):
        if "id" in message:
            self._answers[message["id"]] = message
        elif message["method"] == "Network.responseReceived":
            response = message["params"]["response"]
            self.responses[response["url"]] = response["status"]
        elif message["method"] == "Runtime.exceptionThrown":
            self.failures.append(message["params"]["exceptionDetails"].get("exception", {}).get("description", "?"))

    def _read(self):
        """Read messages, which end with a zero byte, until the browser ends."""
        rest = b""
        with os.fdopen(self._from, "rb", buffering=0) as pipe:
            while chunk := pipe.read(1 << 16):
                *messages, rest = (rest + chunk).split(b"\0")
                for message in messages:
                    self._arrived.put(json.loads(message))
        self._arrived.put(None)
