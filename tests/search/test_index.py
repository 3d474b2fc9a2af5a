"""The index: what an update does, what is found, what is refused."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_contrast.search import ImageIndex, group_duplicates
from lightning_contrast.search.store import VectorTable
from lightning_contrast.serving import RefusedImageError
from tests.search.kill_index import embedder, run
from tests.served_models import encoded, expected, image_model, picture, towers
from tests.tolerances import FORMULA, NETWORK, f32, near

ROW = {"path": "a", "folder": ".", "digest": "0" * 32, "bytes": 1, "changed_ns": 0, "width": 1, "height": 1}


def fill(folder, count=10):
    """Write images in the folder and in two folders below."""
    for number in range(count):
        path = folder / ("", "town", "town/old")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "images")


@pytest.fixture
def index(tmp_path, folder):
    made = ImageIndex(tmp_path / "store", image_model(), folder)
    made.update(batch_size=4)
    return made


def unit(number):
    vector = expected(torch.from_numpy(np.array(picture(number))).permute(2, 0, 1))
    return vector / np.linalg.norm(vector)


def test_the_first_update_adds_all(tmp_path, folder):
    index = ImageIndex(tmp_path / "store", image_model(), folder)
    assert len(index) == 0
    assert index.search(picture_path(folder, 1), 3) == []
    done = index.update(batch_size=4)
    assert len(done.added) == len(index) == 10
    assert (done.changed, done.removed, done.unreadable, done.unchanged) == ([], [], {}, 0)
    paths, vectors = index.stored_vectors()
    wanted = torch.tensor(np.stack([unit(int(Path(path).stem)) for path in paths]))
    torch.testing.assert_close(vectors, wanted, **f32(NETWORK))
    assert index.folders() == {".": 4, "town": 3, "town/old": 3}
    assert index.size_on_disk() > vectors.numel() * 4


def picture_path(folder, number):
    return next(folder.rglob(f"{number}.png"))


def test_hits_are_the_nearest_with_their_cosines(index, folder):
    cosines = {number: float(unit(3) @ unit(number)) for number in range(10)}
    order = sorted(cosines, key=cosines.get, reverse=True)
    for query in (picture_path(folder, 3), picture_path(folder, 3).read_bytes(), unit(3) * 5):
        hits = index.search(query, 4)
        assert [int(Path(hit.path).stem) for hit in hits] == order[:4]
        assert [hit.score for hit in hits] == [near(cosines[number], NETWORK) for number in order[:4]]
    assert (hits[0].width, hits[0].height, hits[0].folder) == (40, 30, ".")
    assert index.path_of(hits[0].digest) == folder / hits[0].path
    assert index.path_of("0" * 32) is None
    assert len(index.search(unit(3), 99)) == 10


def test_filters_are_applied_before_the_search(index):
    hits = index.search(unit(3), 9, where="folder = 'town'")
    assert sorted(hit.path for hit in hits) == ["town/1.png", "town/4.png", "town/7.png"]
    assert index.search(unit(3), 9, where="width > 40") == []
    with pytest.raises(ValueError, match=r"where.*color"):
        index.search(unit(3), 9, where="color = 3")
    with pytest.raises(ValueError, match="probes"):
        index.search(unit(3), 9, probes=0)


def test_a_good_condition_is_not_blamed_for_another_error(tmp_path):
    table = VectorTable(tmp_path / "store", {}, 2)
    table.put([ROW], np.eye(1, 2, dtype=np.float32), replace=False)
    with pytest.raises(Exception, match=r"(?i)dim") as caught:
        table.nearest(np.ones(5, dtype=np.float32), 1, "width > 0", None)
    assert "where" not in str(caught.value)


def test_the_later_of_two_creators_keeps_what_the_first_wrote(tmp_path, monkeypatch):
    writing = VectorTable.writing

    @contextmanager
    def writing_after_another(table):
        monkeypatch.setattr(VectorTable, "writing", writing)
        VectorTable(tmp_path / "store", {"by": "first"}, 2).put([ROW], np.eye(1, 2, dtype=np.float32), replace=False)
        with writing(table):
            yield

    monkeypatch.setattr(VectorTable, "writing", writing_after_another)
    table = VectorTable(tmp_path / "store", {"by": "second"}, 2)
    assert (len(table), table.facts) == (1, {"by": "first"})


def test_an_update_follows_the_folder(index, folder):
    assert index.update().unchanged == 10
    picture_path(folder, 1).unlink()
    picture(77, (50, 20)).save(picture_path(folder, 2))
    picture(78).save(folder / "it's new.png")
    (folder / "broken.png").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    done = index.update()
    assert (done.added, done.changed, done.removed) == (["it's new.png"], ["town/old/2.png"], ["town/1.png"])
    assert (list(done.unreadable), done.unchanged, len(index)) == (["broken.png"], 8, 10)
    (hit,) = index.search(picture_path(folder, 2), 1)
    assert (hit.path, hit.score, hit.width) == ("town/old/2.png", near(1.0, NETWORK), 20)
    assert index.search(folder / "it's new.png", 1)[0].path == "it's new.png"
    assert index.update().unchanged == 10
    picture_path(folder, 2).write_bytes(b"broken now")
    assert index.update().removed == ["town/old/2.png"]
    assert len(index) == 9


def test_a_change_of_the_same_size_and_time_is_found_by_its_content(index, folder):
    first, other = folder / "a.bmp", folder / "b.bmp"
    picture(50).save(first)
    index.update()
    time = first.stat().st_mtime_ns
    picture(51).save(first)
    os.utime(first, ns=(time, time))
    assert index.update().changed == []
    assert index.update(verify=True).changed == ["a.bmp"]
    first.rename(other)
    done = index.update(verify=True)
    assert (done.added, done.removed) == (["b.bmp"], ["a.bmp"])


def test_an_empty_folder_does_not_empty_the_index(index, folder):
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="empty the index"):
        index.update()
    assert len(index) == 10


@pytest.mark.slow
def test_words(tmp_path, folder):
    index = ImageIndex(tmp_path / "store", towers()[0], folder)
    index.update()
    model = towers()[1]
    with torch.no_grad():
        text = model.encode_text(["a cat"])[0]
    paths, vectors = index.stored_vectors()
    cosines = dict(zip(paths, (vectors @ text).tolist(), strict=True))
    hits = index.search("a cat", 3)
    assert [hit.path for hit in hits] == sorted(cosines, key=cosines.get, reverse=True)[:3]
    assert hits[0].score == near(cosines[hits[0].path], NETWORK)


def test_words_need_a_text_tower(index):
    with pytest.raises(ValueError, match="text tower"):
        index.search("a cat")


@pytest.mark.slow
def test_another_model_or_folder_is_refused(index, tmp_path, folder):
    store = tmp_path / "store"
    assert len(ImageIndex(store, image_model())) == 10
    with pytest.raises(ValueError, match="model digest of the index"):
        ImageIndex(store, image_model(seed=1))
    other = embedder()
    other.model_digest, other.dim = index.embedder.model_digest, 12
    with pytest.raises(ValueError, match="preprocessing digest of the index"):
        ImageIndex(store, other)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"folder.*that of the index"):
        ImageIndex(store, image_model(), tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no index"):
        ImageIndex(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(FileNotFoundError, match="no index"):
        ImageIndex(tmp_path / "nowhere", image_model())
    with pytest.raises(ValueError, match=r"store.*folder of an index"):
        ImageIndex(folder, image_model(), folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageIndex(store, image_model(), tmp_path / "nowhere")


def test_without_a_model_vectors_can_be_searched(index, tmp_path):
    read = ImageIndex(tmp_path / "store")
    assert read.search(unit(2), 1)[0].path == "town/old/2.png"
    for action in (read.update, lambda: read.search("a"), lambda: read.search(encoded(picture()))):
        with pytest.raises(ValueError, match=r"model.*given"):
            action()


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (b"nothing", RefusedImageError),
        (np.ones(5), ValueError),
        (np.full(12, np.nan), ValueError),
        (np.zeros(12), ValueError),
        (torch.zeros(3, 4, 4), TypeError),
        (3, TypeError),
    ],
)
def test_queries_that_are_refused(index, query, error):
    with pytest.raises(error):
        index.search(query)


def test_a_reader_sees_what_another_index_wrote(index, tmp_path, folder):
    reader = ImageIndex(tmp_path / "store", image_model())
    picture(60).save(folder / "60.png")
    index.update()
    assert reader.search(unit(60), 1)[0].path == "60.png"


def test_two_writers_are_refused(index, tmp_path):
    import fcntl

    with (tmp_path / "store" / "writer.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="Another process"):
            index.update()
    index.update()


def test_near_duplicates(index, folder):
    shutil.copy(picture_path(folder, 4), folder / "copy.png")
    picture(5).point(lambda value: value * 0.99).save(folder / "darker.png")
    index.update()
    groups = index.near_duplicates(0.999)
    assert sorted(paths for paths, _ in groups) == [["copy.png", "town/4.png"], ["darker.png", "town/old/5.png"]]
    assert all(0.999 <= lowest <= 1 for _, lowest in groups)
    assert index.near_duplicates(1.0) == [(["copy.png", "town/4.png"], near(1.0, FORMULA))]


def test_groups_chain_and_say_so():
    angles = torch.deg2rad(torch.tensor([0.0, 10, 20, 90, 180]))
    (group,) = group_duplicates(torch.stack([angles.cos(), angles.sin()], 1), 0.98)
    assert group.rows == [0, 1, 2]
    assert group.lowest == near(float(torch.cos(angles[2])), FORMULA)
    with pytest.raises(ValueError, match="threshold"):
        group_duplicates(torch.ones(2, 2), 1.5)


def test_groups_are_those_of_all_pairs():
    """Against a plain loop, over the borders of blocks."""
    vectors = torch.nn.functional.normalize(torch.randn(5000, 3), dim=1)
    groups = group_duplicates(vectors[:300], 0.995)
    linked = {(i, j) for i, j in (vectors[:300] @ vectors[:300].T >= 0.995).nonzero().tolist() if i < j}
    together = {(i, j) for group in groups for i in group.rows for j in group.rows if i < j}
    assert linked <= together
    apart = torch.nn.functional.normalize(torch.randn(5000, 64), dim=1)
    apart[4999] = apart[3]
    assert [group.rows for group in group_duplicates(apart, 0.999)] == [[3, 4999]]


def test_an_index_of_many(tmp_path):
    """The vector index gives the exact scores of what it finds, and all lists all rows."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(300):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(
            folder / f"{number}.png"
        )
    index = ImageIndex(tmp_path / "store", embedder(), folder)
    index.update()
    query = index.stored_vectors()[1][7].numpy()
    exact = index.search(query, 10)
    index.build_index(lists=6)
    found = index.search(query, 10, probes=6)
    assert [hit.path for hit in found] == [hit.path for hit in exact]
    assert [hit.score for hit in found] == [near(hit.score, NETWORK) for hit in exact]
    assert index.search(query, 10) == exact
    picture(1).save(folder / "new.png")
    index.update()
    assert index.search(folder / "new.png", 1, probes=1)[0].path == "new.png"


def test_a_small_index_has_no_lists(index):
    with pytest.raises(ValueError, match="256"):
        index.build_index()


@pytest.mark.slow
@pytest.mark.dist
def test_killed_updates():
    """Fewer kills than `python -m tests.search.kill_index`, the earliest while the store is made."""
    results = run(2, 80, seed=0) + run(1, 80, seed=5, commits=0)
    assert len(results) == 3


def test_a_missing_extra_is_named(monkeypatch, folder, tmp_path):
    from lightning_contrast.serving import app

    monkeypatch.setattr(app, "find_spec", lambda name: None if name == "lancedb" else object())
    with pytest.raises(ModuleNotFoundError, match=r"needs lancedb: pip install 'lightning_contrast\[search\]'"):
        ImageIndex(tmp_path / "store", embedder(), folder)


@pytest.mark.slow
def test_the_package_needs_none_of_it():
    source = (
        "import sys, lightning_contrast as lc; lc.serving, lc.search; print({'fastapi', 'lancedb'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
