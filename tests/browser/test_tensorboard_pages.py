"""Output of `ViewLogger` and `EmbeddingLogger` on the pages of TensorBoard in a headless browser."""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from lightning_contrast.augment import simclr_views
from lightning_contrast.callbacks import EmbeddingLogger, ViewAugmentation, ViewLogger
from lightning_contrast.data import EmojiDataModule
from tests.browser.chromium import PACKAGE, Chromium, find_chromium
from tests.callbacks.picture_runs import events, fit

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason=f"needs a browser: apt-get install {PACKAGE}"),
]
POINTS = 120


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run of two epochs on the emoji."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    data = EmojiDataModule(batch_size=40)
    data.setup("fit")
    callbacks = [ViewLogger(4), ViewAugmentation(simclr_views(32)), EmbeddingLogger(class_names=data.class_names)]
    settings = {"limit_train_batches": 3, "limit_val_batches": 3, "num_sanity_val_steps": 0}
    logger = TensorBoardLogger(folder, name="emoji")
    fit(callbacks, data.train_dataloader(), data.val_dataloader(), folder=folder, logger=logger, **settings)
    logger.experiment.flush()
    return folder


@pytest.fixture(scope="module")
def server(run):
    """Return the address of a TensorBoard on this machine."""
    options = ["--logdir", str(run), "--host", "127.0.0.1", "--port", "0", "--load_fast=false", "--reload_interval=1"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        addresses = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
        yield next(filter(None, addresses)).group()
        process.terminate()


@pytest.fixture
def browser(tmp_path):
    with Chromium(tmp_path) as tab:
        yield tab


def keep(tab, name, folder):
    """Return the pixels of a screenshot; it is also copied to the folder BROWSER_SHOTS if that is set."""
    tab.screenshot(folder / name)
    if "BROWSER_SHOTS" in os.environ:
        Path(os.environ["BROWSER_SHOTS"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, os.environ["BROWSER_SHOTS"])
    return np.asarray(Image.open(folder / name).convert("RGB"))


def answers(tab, route):
    """Return status and query of the responses of a TensorBoard route, by address."""
    return {
        address: (status, parse_qs(urlsplit(address).query))
        for address, status in tab.responses.items()
        if urlsplit(address).path.endswith(route)
    }


def test_the_projector_shows_the_embeddings_with_pictures_and_labels(server, run, browser, tmp_path):
    browser.open(f"{server}/#projector")
    browser.wait_for(lambda: answers(browser, "/projector/sprite_image"), "sprite")
    browser.wait_for(lambda: f"Points: {POINTS}" in browser.text(), "number of points")
    text = browser.text()
    assert "2 tensors found" in text
    assert f"embeddings:00003 {POINTS}x3" in text
    assert f"embeddings:00006 {POINTS}x3" in text
    assert "Dimension: 3" in text
    assert "Label by label image" in text
    for route in ("tensor", "metadata", "sprite_image"):
        ((status, query),) = answers(browser, f"/projector/{route}").values()
        assert status == 200
        assert query["name"] == ["embeddings:00003"]  # the page sorts by name and opens the first

    (path,) = run.rglob("projector_config.pbtxt")
    entry = text_format.Parse(path.read_text(), ProjectorConfig()).embeddings[0]
    ((address, _),) = answers(browser, "/projector/sprite_image").items()
    sent = urlopen(address).read()
    assert sent == (path.parent / entry.sprite.image_path).read_bytes()

    # The scene between the panels has the colors of the emoji; dots would have a single color.
    def colors():
        page = keep(browser, "projector.png", tmp_path)
        scene = page[150:850, 330:1060].reshape(-1, 3)
        return len(np.unique(scene // 32, axis=0)) > 60

    browser.wait_for(colors, "pictures in the scene")
    assert not browser.failures


def test_the_image_page_shows_every_picture_as_it_was_written(server, run, browser, tmp_path):
    written = events(run)
    tags = {"views": 3, "embeddings/map": 6, "embeddings/neighbours": 6}
    browser.open(f"{server}/#images")
    browser.wait_for(lambda: len(answers(browser, "/images/individualImage")) == 3, "three pictures")
    browser.wait_for(lambda: len(browser.pictures()) == 3, "three pictures on the page")
    shown = {(width, height) for _, width, height in browser.pictures()}
    assert shown == {written[tag, step].shape[1::-1] for tag, step in tags.items()}
    text = browser.text()
    assert all(f"{tag} emoji/version_0 step {step}" in text for tag, step in tags.items())
    for address, width, height in browser.pictures():
        sent = np.asarray(Image.open(io.BytesIO(urlopen(address).read())))
        assert any(np.array_equal(sent, picture) for picture in written.values()), (width, height)
    assert len(np.unique(keep(browser, "images.png", tmp_path).reshape(-1, 3) // 32, axis=0)) > 60
    assert not browser.failures
