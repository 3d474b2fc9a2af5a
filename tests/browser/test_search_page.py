"""The page of image search in a headless browser: words, a dropped image, a chosen hit, a folder, on a phone."""

import base64
import threading
import time

import pytest
import uvicorn

from lightning_contrast.search import ImageIndex, create_search_app
from tests.browser.chromium import PACKAGE, Chromium, find_chromium
from tests.served_models import encoded, picture, towers

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason=f"needs a browser: apt-get install {PACKAGE}"),
    pytest.mark.filterwarnings("ignore"),
]
NAME = "<img src=x onerror=alert(1)>.png"
PATHS = "[...document.querySelectorAll('#hits .path')].map(path => path.textContent)"
LOADED = "[...document.querySelectorAll('#hits img')].every(image => image.complete && image.naturalWidth > 0)"
WORDS = """(() => {
  document.getElementById('words').value = 'a cat';
  document.getElementById('go').click();
})()"""
DROP = """(() => {
  const bytes = Uint8Array.from(atob('%s'), character => character.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
  document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
})()"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    for number in range(9):
        path = folder / "images" / ("", "a town with a long name")[number % 2] / (f"{number}.png" if number else NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, (60, 80)).save(path)
    made = ImageIndex(folder / "store", towers()[0], folder / "images")
    made.update()
    return made


@pytest.fixture(scope="module")
def address(index):
    server = uvicorn.Server(uvicorn.Config(create_search_app(index), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def tab(tmp_path, address):
    with Chromium(tmp_path) as opened:
        opened.open(address)
        opened.wait_for(lambda: "9 images can be searched" in opened.text(), "page")
        yield opened


def hits(tab, first):
    """Return the paths of the hits once the first one is there and all pictures are loaded."""
    tab.wait_for(lambda: (tab.evaluate(PATHS) or [None])[0] == first, f"hit {first}", 30)
    return tab.evaluate(PATHS)


def test_the_page_searches(tab, index, address, tmp_path):
    words = [hit.path for hit in index.search("a cat", 24)]
    tab.evaluate(WORDS)
    assert hits(tab, words[0]) == words
    tab.evaluate(DROP % base64.b64encode(encoded(picture(3, (60, 80)))).decode())
    assert sorted(hits(tab, "a town with a long name/3.png")) == sorted(words)
    assert tab.evaluate("document.querySelector('#hits .score').textContent") == "1.000"
    tab.evaluate("document.querySelectorAll('#hits button')[1].click()")
    second = [hit.path for hit in index.search(picture_file(index, 3), 2)][1]
    hits(tab, second)
    tab.evaluate("(() => { const s = document.getElementById('folder'); s.selectedIndex = 1;"
                 " s.dispatchEvent(new Event('change')); })()")  # fmt: skip
    tab.wait_for(lambda: len(tab.evaluate(PATHS)) == 5, "the hits of one folder", 30)
    assert NAME in tab.evaluate(PATHS)
    tab.wait_for(lambda: tab.evaluate(LOADED), "pictures", 30)
    tab.evaluate(DROP % base64.b64encode(b"no image").decode())
    tab.wait_for(lambda: "not an image" in tab.text(), "reason", 30)
    assert tab.failures == []
    assert {url for url in tab.responses if not url.startswith(("blob:", "data:"))} <= {
        f"{address}/{path}" for path in ("", "index", "search", *(image_paths(index)))
    }


def picture_file(index, number):
    return next(index.folder.rglob(f"{number}.png"))


def image_paths(index):
    return [f"images/{hit.digest}" for hit in index.search("a", 24)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(tab, scheme, tmp_path):
    tab.emulate(width=375, height=800, scheme=scheme)
    tab.evaluate(WORDS)
    tab.wait_for(lambda: tab.evaluate(f"{PATHS}.length") == 9 and tab.evaluate(LOADED), "pictures", 30)
    tab.screenshot(tmp_path / f"{scheme}.png")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    columns = "new Set([...document.querySelectorAll('#hits li')].map(li => li.getBoundingClientRect().left)).size"
    assert tab.evaluate(columns) == 2
    small = "[...document.querySelectorAll('button, select, input:not(#file)')].filter(e => !e.hidden)"
    assert tab.evaluate(f"{small}.every(e => e.getBoundingClientRect().height >= 44)")
    background = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(background) == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 23, 28)"}[scheme]
