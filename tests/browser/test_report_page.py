"""The page of a report in a headless browser: opened from its file, sorted, enlarged, on a phone and in the dark."""

import json

import pytest
from torch import nn

from lightning_contrast import evaluation
from lightning_contrast.data import EmojiDataModule
from tests.browser.chromium import PACKAGE, Chromium, find_chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason=f"needs a browser: apt-get install {PACKAGE}"),
]
SORTED = """(() => {
  const table = document.querySelector('#summary + .scroll table');
  table.querySelectorAll('th button')[1].click();
  return JSON.stringify([...table.tBodies[0].rows].map(row => Number(row.cells[1].dataset.value)));
})()"""
# Sizes of the images of the first map, on the page and enlarged.
THUMBNAILS = """(() => {
  const figure = [...document.querySelectorAll('figure')].find(of => of.textContent.startsWith('Map'));
  const sizes = of => [...of.querySelectorAll('use')].map(image => image.getBoundingClientRect().width);
  const small = sizes(figure);
  figure.click();
  const dialog = document.getElementById('large');
  const large = sizes(dialog);
  dialog.click();
  return JSON.stringify([small, large]);
})()"""
LARGE = """(() => {
  document.querySelector('figure').click();
  const dialog = document.getElementById('large');
  const found = [dialog.open, dialog.querySelector('svg').getBoundingClientRect().width];
  dialog.click();
  return JSON.stringify([...found, dialog.open]);
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return the path of a page with two models."""
    folder = tmp_path_factory.mktemp("report")
    models = {
        "cells": nn.Sequential(nn.AvgPool2d(4), nn.Flatten()),
        "means": nn.Sequential(nn.AvgPool2d(16), nn.Flatten()),
    }
    parts = ("knn", "retrieval", "geometry")
    evaluation.report(models, EmojiDataModule(), output=folder, parts=parts, options={"pictures": 40}, progress=False)
    return folder / "report.html"


@pytest.fixture
def browser(tmp_path):
    with Chromium(tmp_path) as tab:
        yield tab


def test_the_page_opens_from_its_file_and_works(page, browser):
    browser.open(page.as_uri())
    browser.wait_for(lambda: "Nearest neighbors" in browser.text(), "page")
    browser.wait_for(lambda: browser.evaluate("document.readyState") == "complete", "script of the page")
    values = json.loads(browser.evaluate(SORTED))
    assert values == sorted(values)
    assert len(values) == 3
    downwards = json.loads(browser.evaluate(SORTED))
    assert downwards == sorted(values, reverse=True)
    is_open, width, is_still_open = json.loads(browser.evaluate(LARGE))
    assert is_open
    assert width > 600
    assert not is_still_open
    small, large = json.loads(browser.evaluate(THUMBNAILS))
    assert len(small) == len(large) == 40
    assert 8 < max(small) < min(large)
    browser.text()  # takes the events that have arrived
    assert browser.failures == browser.console == []
    assert {address.split(":")[0] for address in browser.responses} <= {"file", "data"}
    assert [address for address in browser.responses if address.startswith("file")] == [page.as_uri()]


def test_it_fits_a_phone_and_follows_the_dark_scheme(page, browser):
    browser.open(page.as_uri())
    browser.wait_for(lambda: "Nearest neighbors" in browser.text(), "page")
    backgrounds = []
    for scheme in ("light", "dark"):
        browser.emulate(width=375, height=800, scheme=scheme)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 375
        backgrounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        color = browser.evaluate("getComputedStyle(document.body).color")
        assert browser.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill") == color
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(18, 23, 28)"]
