"""The documentation site builds without a warning, loads nothing from other servers, fits a phone and is searched."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightning_contrast.cli.method_cards import method_cards
from tests.browser.chromium import Chromium, find_chromium

ROOT = Path(__file__).parents[2]
PAGES = ("index.html", "concepts.html", "command_line.html", "methods/index.html", "methods/SimCLR.html")
PAGES += ("methods/TemporalContrast.html", "plugins.html", "learn.html", "migration.html", "api/losses.html")
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SEARCH = """(() => {
  const field = document.querySelector('.md-search__input');
  field.focus();
  field.value = 'barlow';
  for (const name of ['input', 'keyup']) field.dispatchEvent(new Event(name, {bubbles: true}));
})()"""
RESULTS = "[...document.querySelectorAll('.md-search-result__item a')].map(a => a.href).join(' ')"


def build(folder):
    """Build the site as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "WARNING" not in ran.stderr


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Write nothing."""


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.dist  # starts processes
def test_the_site_is_whole(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    site = tmp_path / "site"
    build(site)
    for name in method_cards():
        text = (site / "methods" / f"{name}.html").read_text()
        assert all(mark in text for mark in ("Measured", "<svg viewBox", "<math", "Pitfalls")), name
        assert "```" not in text, name
    for page in (site / "api").glob("*.html"):
        assert "<blockquote>" not in page.read_text(), page  # an example, or "> 0" at the start of a text
    sheets = r'<link[^>]*rel="(?:stylesheet|preload|preconnect)"[^>]*\bhref'
    loaded = rf'(?:<script[^>]*\bsrc|{sheets}|<img[^>]*\bsrc)="(https?:.*?)"'
    for page in site.rglob("*.html"):
        assert re.findall(loaded, page.read_text()) == [], page
    if find_chromium() is None:
        pytest.skip("the site was built; no Chromium to look at it")
    look_at(site, tmp_path)


def look_at(site, tmp_path):
    """Open pages at two widths: nothing is wider than the screen, missing, or from elsewhere; the search finds."""
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_address[1]}"
    (tmp_path / "profile").mkdir()
    try:
        with Chromium(tmp_path / "profile") as browser:
            for width in (1400, 375):
                browser.emulate(width=width, height=900, scheme="light")
                for page in PAGES:
                    browser.open(f"{root}/{page}")
                    browser.wait_for(lambda page=page: browser.evaluate(f"location.href.endsWith('{page}')"), page)
                    browser.wait_for(lambda: browser.evaluate("document.readyState") == "complete", page)
                    assert browser.evaluate(OVERFLOW) <= 0, (page, width)
                    browser.screenshot(tmp_path / f"{page.replace('/', '_')}-{width}.png")
            browser.open(f"{root}/index.html")
            browser.wait_for(lambda: browser.evaluate("document.readyState") == "complete", "start page")
            browser.evaluate(SEARCH)
            found = browser.wait_for(lambda: browser.evaluate(RESULTS), "result of the search")
            assert "BarlowTwins.html" in found
            assert browser.failures == []
            bad = {address: status for address, status in browser.responses.items() if status >= 400}
            assert bad == {}
            assert all(address.startswith((root, "data:", "blob:")) for address in browser.responses)
    finally:
        server.shutdown()
        server.server_close()
