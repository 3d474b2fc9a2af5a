"""Parquet shards of a data set: what is in them, resuming, and the same vectors for any number of processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_contrast as lc
from lightning_contrast.cli import main
from lightning_contrast.evaluation import embed_dataset, encode, read_embeddings
from lightning_contrast.export import export
from tests.launch import run_processes
from tests.tolerances import assert_same_bits

ROWS = 23


def network():
    torch.manual_seed(0)
    return lc.nn.build_backbone("small_convnet", backbone_kwargs={"width": 4}).module.eval()


def loader(rows=ROWS, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return DataLoader(TensorDataset(pixels, torch.arange(rows) % 5), batch_size=4, **options)


def vectors(folder):
    return torch.tensor(read_embeddings(folder).column("feature").to_pylist())


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_every_row_once_with_its_features_and_label(tmp_path):
    data = loader(shuffle=True, drop_last=True)
    folder = embed_dataset(network(), data, tmp_path / "new" / "vectors", shard_size=7)
    table = pyarrow.parquet.read_table(folder)  # pyarrow alone leaves the manifest out
    assert table.equals(read_embeddings(folder))
    assert table.column("id").to_pylist() == list(range(ROWS))
    assert table.column("label").to_pylist() == [row % 5 for row in range(ROWS)]
    assert table.column("path").null_count == ROWS
    expected = encode(network(), data.dataset.tensors[0], lambda given: given.float() / 255, batch_size=4)
    assert_same_bits(vectors(folder), expected)
    manifest = json.loads((folder / "_manifest.json").read_text())
    assert [entry["rows"] for entry in manifest["shards"]] == [8, 8, 7]  # whole batches
    assert sorted(path.name for path in folder.glob("*.parquet")) == [entry["file"] for entry in manifest["shards"]]


def test_paths_and_unlabeled_images_of_a_folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (number * 50, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    data = lc.data.ImageFolderDataModule(tmp_path / "images", size=16, batch_size=2, num_workers=0)
    model = export(network(), tmp_path / "net.pt", input_spec={"size": 16, "mean": None, "std": None})
    folder = embed_dataset(model, data.predict_dataloader(), tmp_path / "vectors")
    table = read_embeddings(folder)
    assert table.column("path").to_pylist() == [str(tmp_path / "images" / f"{number}.png") for number in range(5)]
    assert table.column("label").to_pylist() == [-1] * 5
    part = DataLoader(Subset(data.predict_dataloader().dataset, [3, 1]), batch_size=2)
    found = read_embeddings(embed_dataset(model, part, tmp_path / "part")).column("path").to_pylist()
    assert [os.path.basename(path) for path in found] == ["3.png", "1.png"]


def test_a_pass_resumes_after_whole_shards_and_repairs_damaged_ones(tmp_path):
    model, calls = network(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    folder = embed_dataset(model, loader(), tmp_path / "a", shard_size=4)
    whole, passes = bytes_of(folder), len(calls)
    (folder / "shard-00001.parquet").unlink()
    (folder / "_manifest.json").unlink()
    damaged = folder / "shard-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:200])
    swapped = folder / "shard-00004.parquet"
    swapped.write_bytes(whole["shard-00002.parquet"])
    with pytest.raises(FileNotFoundError, match=r"`folder` must hold a whole embedding with _manifest\.json"):
        read_embeddings(folder)
    calls.clear()
    embed_dataset(model, loader(), folder, shard_size=4)
    assert len(calls) == passes - 6 + 3  # six shards of one batch, and the first pass for the digest
    assert bytes_of(folder) == whole
    swapped.write_bytes(whole["shard-00002.parquet"])
    with pytest.raises(ValueError, match=r"hold the shards of its manifest, got 'shard-00004"):
        read_embeddings(folder)


@pytest.mark.parametrize("change", ["model", "data", "size"])
def test_another_embedding_in_the_folder_is_refused(tmp_path, change):
    embed_dataset(network(), loader(), tmp_path, shard_size=4)
    model = network()
    if change == "model":
        with torch.no_grad():
            model.stem[0].weight[0, 0, 0, 0] += 1
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match=f"`folder` must hold the same embedding, got .* with other .*{change}"):
        embed_dataset(model, loader(seed=int(change == "data")), tmp_path, shard_size=8 if change == "size" else 4)
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loader": [1]}, TypeError, "`loader` must be a DataLoader whose rows are read by index"),
        ({"shard_size": 0}, ValueError, "`shard_size` must be >= 1, got 0"),
        ({"ray_workers": -1}, ValueError, "`ray_workers` must be >= 0, got -1"),
        ({"loader": loader(0)}, ValueError, "`loader` must draw at least one row"),
    ],
)
def test_what_is_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        embed_dataset(**{"model": network(), "loader": loader(), "folder": tmp_path} | options)


@pytest.mark.parametrize(("name", "extra"), [("pyarrow", "embed"), ("ray", "ray")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"lightning_contrast\[{extra}\]"):
        embed_dataset(network(), loader(), tmp_path, ray_workers=2)


@pytest.mark.dist
def test_two_and_three_processes_write_the_same_bytes(tmp_path):
    whole = bytes_of(embed_dataset(network(), loader(), tmp_path / "one", shard_size=4))

    def run(rank, folder):
        embed_dataset(network(), loader(), folder, shard_size=4)
        return sorted(bytes_of(folder)) == sorted(whole)

    for processes in (2, 3):
        folder = tmp_path / str(processes)
        assert all(run_processes(run, processes, folder))
        assert bytes_of(folder) == whole


@pytest.mark.slow
@pytest.mark.dist
def test_the_command_is_killed_and_resumed(tmp_path):
    """SIGKILL at moments spread over the pass: no row is lost or twice, and the bytes are those of a whole pass."""
    model = export(network(), tmp_path / "net.pt", input_spec={"size": 32, "mean": None, "std": None})
    arguments = ["embed", str(model), "FOLDER", "--data", "EmojiDataModule", "--split", "train", "--shard_size", "64"]
    arguments += ["--data.batch_size", "16"]
    whole = main([part.replace("FOLDER", str(tmp_path / "whole")) for part in arguments])
    given = [part.replace("FOLDER", str(tmp_path / "killed")) for part in arguments]
    kills = 0
    for wait in (1, 6):
        process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "lightning_contrast", *given])
        deadline = time.monotonic() + 100
        while len(list((tmp_path / "killed").glob("*.parquet"))) < wait and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "_manifest.json").exists() or kills == 0
    assert kills > 0
    main(given)
    left = {path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")}
    assert {name: data for name, data in bytes_of(tmp_path / "killed").items() if name not in left} == bytes_of(whole)


def listening(process):
    """Return the addresses on which a process and its descendants listen."""
    processes = [process, *process.children(recursive=True)]
    return {each.laddr.ip for one in processes for each in one.net_connections("tcp") if each.status == "LISTEN"}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")  # of Ray's own
def test_a_killed_driver_of_two_ray_workers_is_resumed_to_the_same_bytes(tmp_path, monkeypatch):
    """The Ray that we start listens on loopback alone, and ends with a driver that gets SIGKILL."""
    ray, psutil = pytest.importorskip("ray"), pytest.importorskip("psutil")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other tests starve them
    model = export(network(), tmp_path / "net.pt", input_spec={"size": 32, "mean": None, "std": None})
    arguments = ["embed", str(model), "FOLDER", "--data", "EmojiDataModule", "--split", "train", "--shard_size", "16"]
    arguments += ["--data.batch_size", "16"]
    whole = bytes_of(main([part.replace("FOLDER", str(tmp_path / "whole")) for part in arguments]))
    folder = tmp_path / "killed"
    given = [part.replace("FOLDER", str(folder)) for part in arguments] + ["--ray_workers", "2"]
    driver = psutil.Popen([sys.executable, "-W", "ignore", "-m", "lightning_contrast", *given])
    deadline = time.monotonic() + 200
    while not list(folder.glob("*.parquet")) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    started = {process: process.name() for process in driver.children(recursive=True)}
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    workers = [process for process, name in started.items() if name.startswith("ray::MapWorker")]
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    for process in started:  # Ray's agents notice it after a minute only
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 0 < len(kept) < len(whole) - 2
    assert not (folder / "_manifest.json").exists()
    try:
        main(given)
        assert listening(psutil.Process()) == {"::ffff:127.0.0.1", "127.0.0.1"}
    finally:
        ray.shutdown()
    assert {name: data for name, data in bytes_of(folder).items() if name in whole} == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
