"""Headless Chromium, controlled over a pipe by the Chrome DevTools Protocol, with the standard library only."""

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
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no connections to other machines
    "--window-size=1400,1000",
    "--remote-debugging-pipe",
)
# The browser reads from descriptor 3 and writes to 4; `subprocess` keeps the numbers of inherited descriptors.
START = """import os, sys
to, back = (os.dup(int(number)) for number in sys.argv[1:3])
for here, there in ((to, 3), (back, 4)):
    os.dup2(here, there)
    os.set_inheritable(there, True)
os.execv(sys.argv[3], sys.argv[3:])"""
# All text of a page, including shadow roots and frames of the same server.
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
# Address, width and height of each loaded image.
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
    """Context manager of one browser tab with a temporary profile.

    Attributes:
        responses: Status of each response, by address.
        failures: Uncaught errors of scripts.
        console: Errors in the console, such as those of the content security policy.
    """

    def __init__(self, folder):
        self.responses, self.failures, self.console = {}, [], []
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
            for domain in ("Page", "Network", "Runtime", "Log"):
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
            os.killpg(self._process.pid, 9)  # the browser and its child processes
            self._process.wait()
        self._reader.join(10)
        os.close(self._to)

    def open(self, address):
        """Open a page."""
        self._send("Page.navigate", url=address)

    def emulate(self, *, width, height, scheme):
        """Show the page as on a screen of a size in pixels, with the color scheme "light" or "dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        self._send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script):
        """Return the value of a JavaScript expression in the page."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def wait_for(self, condition, what, seconds=120):
        """Return the first true value of a function; fail with the text of the page after a timeout."""
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
        """Write a screenshot as a PNG file."""
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
        """Process received messages; with ``seconds``, wait for at least one."""
        try:
            message = self._arrived.get(timeout=seconds) if seconds is not None else self._arrived.get_nowait()
        except queue.Empty:
            if seconds is not None:
                raise TimeoutError("the browser does not respond") from None
            return
        except ValueError:
            raise TimeoutError("the browser does not respond") from None
        while message is not None:
            self._sort(message)
            try:
                message = self._arrived.get_nowait()
            except queue.Empty:
                return
        raise OSError("the browser has exited")

    def _sort(self, message):
        if "id" in message:
            self._answers[message["id"]] = message
        elif message["method"] == "Network.responseReceived":
            response = message["params"]["response"]
            self.responses[response["url"]] = response["status"]
        elif message["method"] == "Runtime.exceptionThrown":
            self.failures.append(message["params"]["exceptionDetails"].get("exception", {}).get("description", "?"))
        elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.console.append(message["params"]["entry"]["text"])
        elif message["method"] == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
            self.console.append(str(message["params"]["args"]))

    def _read(self):
        """Read zero-terminated messages until the browser exits."""
        rest = b""
        with os.fdopen(self._from, "rb", buffering=0) as pipe:
            while chunk := pipe.read(1 << 16):
                *messages, rest = (rest + chunk).split(b"\0")
                for message in messages:
                    self._arrived.put(json.loads(message))
        self._arrived.put(None)
