"""Checkpoints are whole or not there; damaged ones are refused by name, and the one before takes the last's place."""

import errno
import os
import re
import resource
import subprocess

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc
from lightning_contrast.checkpoints import (
    AtomicCheckpointIO,
    _Writer,
    check_checkpoint,
    latest_checkpoint,
    load_checkpoint,
)
from tests.launch import run_processes

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Module(L.LightningModule):
    """A layer of 40 kB, so that a disk can be too small for a second checkpoint."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(100, 100)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, steps, ckpt_path=None, plugin=AtomicCheckpointIO, **kwargs):
    torch.manual_seed(0)
    saves = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, **kwargs)
    plugins = [] if plugin is None else [plugin()]
    trainer = L.Trainer(**QUIET, max_steps=steps, callbacks=[saves], plugins=plugins)
    trainer.fit(Module(), DataLoader(TensorDataset(torch.ones(8, 100)), batch_size=4), ckpt_path=ckpt_path)
    return trainer


def steps_of(path):
    return load_checkpoint(path)["global_step"]


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(path):
    """Change one byte of a weight."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)


# ---------------------------------------------------------------------------------------------------- what is damaged

DAMAGES = [
    (cut, r"was not written completely \(\d+ bytes"),
    (lambda path: cut(path, 0.999), r"was not written completely"),
    (flip, r"was modified after it was written: the checksum of .*data/\d+ does not match"),
    (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    (lambda path: path.write_bytes(bytes(5000)), r"is empty \(5000 bytes\)"),
    (lambda path: path.write_text("<html>Not found</html>"), r"was not written by `torch.save`"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, 2)
    return (folder / "last.ckpt").read_bytes()


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=["cut", "last bytes", "flipped", "empty", "zeros", "text"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, checkpoint, damage, words):
    path = tmp_path / "epoch=3.ckpt"
    path.write_bytes(checkpoint)
    check_checkpoint(path)
    damage(path)
    message = rf"`checkpoint` must be intact, but .*epoch=3\.ckpt {words}.*`latest_checkpoint\(folder\)`"
    for read in (check_checkpoint, load_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "other", 4, ckpt_path=path)


def test_torch_itself_does_not_see_a_changed_byte(tmp_path, checkpoint):
    """Why the checksums are looked at; should torch do so one day, `_damage` may go."""
    path = tmp_path / "changed.ckpt"
    path.write_bytes(checkpoint)
    flip(path)
    torch.load(path, weights_only=True)


def test_checksums_are_not_asked_for_where_torch_writes_none(tmp_path):
    path, kept = tmp_path / "a.ckpt", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(100)}, path)
        assert torch.equal(load_checkpoint(path)["a"], torch.arange(100))
    finally:
        torch.serialization.set_crc32_options(kept)


def test_the_format_of_old_files_is_read(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(tmp_path / "old.pth")["a"], torch.ones(3))
    cut(tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"`checkpoint` must be written by `torch.save`, but .*old\.pth is not"):
        load_checkpoint(tmp_path / "old.pth")


def test_a_sharded_checkpoint_is_whole_with_its_last_files(tmp_path):
    folder = tmp_path / "epoch=1.ckpt"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"shard")
    with pytest.raises(ValueError, match=r"epoch=1\.ckpt lacks \.metadata: it was not written completely"):
        check_checkpoint(folder)
    (folder / ".metadata").write_bytes(b"...")
    with pytest.raises(ValueError, match=r"lacks meta\.pt"):
        check_checkpoint(folder)
    torch.save({"loops": 1}, folder / "meta.pt")
    check_checkpoint(folder)
    assert latest_checkpoint(tmp_path) == folder
    cut(folder / "meta.pt")
    with pytest.raises(ValueError, match="was not written completely"):
        check_checkpoint(folder)


def test_a_missing_file(tmp_path):
    for read in (check_checkpoint, load_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(FileNotFoundError, match=r"`checkpoint` must be an existing file, got '.*nothing\.ckpt'"):
            read(tmp_path / "nothing.ckpt")


# ---------------------------------------------------------------------------------------------------- the last one


@pytest.mark.filterwarnings("ignore:The checkpoint .* It is skipped")
def test_last_falls_back_to_the_newest_whole_checkpoint(tmp_path):
    fit(tmp_path, 6, save_top_k=-1)
    for step, name in enumerate(["epoch=0-step=2", "epoch=1-step=4", "epoch=2-step=6"]):
        os.utime(tmp_path / f"{name}.ckpt", ns=(0, 1000 * step))
    cut(tmp_path / "last.ckpt")
    cut(tmp_path / "epoch=2-step=6.ckpt")
    with pytest.warns(UserWarning, match="resumes from") as warned:
        trainer = fit(tmp_path, 8, ckpt_path="last", save_top_k=-1)
    told = [str(warning.message) for warning in warned]
    assert any("step=6.ckpt was not written completely" in text and "It is skipped." in text for text in told)
    assert any("last.ckpt was not written completely" in text and "step=4.ckpt instead" in text for text in told)
    assert trainer.global_step == 8
    whole = fit(tmp_path / "whole", 8)
    for ours, theirs in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert steps_of(tmp_path / "last.ckpt") == 8  # mended


def test_nothing_whole_is_an_error_and_not_a_new_run(tmp_path):
    fit(tmp_path, 2, save_top_k=0)
    cut(tmp_path / "last.ckpt")
    with (
        pytest.warns(UserWarning, match="It is skipped"),
        pytest.raises(ValueError, match=r"must be intact, but .*last\.ckpt was not written completely"),
    ):
        fit(tmp_path, 4, ckpt_path="last")


def test_latest_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None
    for number, name in enumerate(["a/1.ckpt", "b/2.ckpt", "3.ckpt", "4.pt", ".5.ckpt"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save({"number": number}, path)
        os.utime(path, ns=(0, number))
    (tmp_path / "dangling.ckpt").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".6.ckpt.part").write_bytes(b"half")
    assert latest_checkpoint(str(tmp_path)) == tmp_path / "3.ckpt"
    cut(tmp_path / "3.ckpt")
    with pytest.warns(UserWarning, match=r"3\.ckpt was not written completely .* It is skipped"):
        assert latest_checkpoint(tmp_path) == tmp_path / "b" / "2.ckpt"


# ---------------------------------------------------------------------------------------------------- writing


def test_a_write_is_one_rename(tmp_path, monkeypatch):
    """At no moment does the name stand for anything but a whole file: the old one, then the new one."""
    path, plugin, seen = tmp_path / "new" / "last.ckpt", AtomicCheckpointIO(), []
    plugin.save_checkpoint({"step": 1, "weight": torch.zeros(1000)}, path)
    inner = _Writer.write

    def looking(self, data):
        seen.append(load_checkpoint(path)["step"])
        return inner(self, data)

    monkeypatch.setattr(_Writer, "write", looking)
    plugin.save_checkpoint({"step": 2, "weight": torch.ones(1000)}, path)
    assert len(seen) > 3
    assert set(seen) == {1}
    assert load_checkpoint(path)["step"] == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "first.ckpt")
    (tmp_path / "last.ckpt").symlink_to("first.ckpt")
    AtomicCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert (load_checkpoint(tmp_path / "first.ckpt"), load_checkpoint(tmp_path / "last.ckpt")) == (
        {"step": 1},
        {"step": 2},
    )


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert load_checkpoint(path) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_remote_folders_are_left_to_lightning():
    AtomicCheckpointIO().save_checkpoint({"step": 1}, "memory://folder/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://folder/last.ckpt") == {"step": 1}


FULL = r"Cannot write the checkpoint .*last\.ckpt: {}. Earlier checkpoints are intact: free disk space"


def _fills(rank, folder, plugin):
    """Train with a limit on the size of files that is reached in the second checkpoint."""
    saved = fit(folder, 2, save_top_k=0, plugin=plugin)
    size = (folder / "last.ckpt").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        fit(folder, 4, ckpt_path="last", save_top_k=0, plugin=plugin)
    except OSError as error:
        return saved.global_step, error.errno, str(error)
    return None


@pytest.mark.dist
def test_a_write_that_the_system_refuses_names_the_checkpoint_and_leaves_the_one_before(tmp_path):
    [(step, number, message)] = run_processes(_fills, 1, tmp_path, AtomicCheckpointIO, init=False)
    assert number == errno.EFBIG
    assert re.search(FULL.format("File too large"), message), message
    assert steps_of(tmp_path / "last.ckpt") == step == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]  # no half of the second
    assert fit(tmp_path, 6, ckpt_path="last", save_top_k=0).global_step == 6


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for one checkpoint of 42 kB and half of another, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_names_the_checkpoint_and_leaves_the_one_before(small_disk):
    fit(small_disk, 2, save_top_k=0)
    with pytest.raises(OSError, match=FULL.format("No space left on device")) as error:
        fit(small_disk, 4, ckpt_path="last", save_top_k=0)
    assert error.value.errno == errno.ENOSPC
    assert [entry.name for entry in small_disk.iterdir()] == ["last.ckpt"]
    assert steps_of(small_disk / "last.ckpt") == 2


def test_lightnings_own_writer_destroys_the_last_one_on_another_disk(small_disk):
    """The reason for `AtomicCheckpointIO`; fails if a later version of Lightning writes atomically."""
    path, too_large = small_disk / "last.ckpt", {"step": 2, "weight": torch.ones(30_000)}
    for plugin in (AtomicCheckpointIO(), TorchCheckpointIO()):
        plugin.save_checkpoint({"step": 1}, path)
        with pytest.raises(OSError, match="No space left on device"):
            plugin.save_checkpoint(too_large, path)
        if type(plugin) is AtomicCheckpointIO:
            assert load_checkpoint(path) == {"step": 1}
    with pytest.raises(ValueError, match=r"last\.ckpt (was not written completely|is empty)"):
        check_checkpoint(path)


# ---------------------------------------------------------------------------------------------------- entries of ours


# Lightning 2.6 calls jsonargparse in ways that 4.49 has deprecated.
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command_line_writes_atomically(tmp_path, monkeypatch):
    from lightning_contrast.cli import main

    monkeypatch.setattr("sys.argv", ["lightning_contrast"])
    arguments = ["--model=SimCLR", "--model.backbone=small_convnet", "--data=EmojiDataModule", "--trainer.logger=false"]
    cli = main([*arguments, "--trainer.accelerator=cpu", "--seed_everything=0"], run=False)
    assert type(cli.trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_continuing_refuses_a_damaged_checkpoint(tmp_path, checkpoint):
    path = tmp_path / "last.ckpt"
    path.write_bytes(checkpoint)
    cut(path)
    with pytest.raises(ValueError, match=r"must be intact, but .*last\.ckpt was not written completely"):
        lc.resuming.extend_training(path, 1)
    with pytest.raises(ValueError, match=r"must be intact, but .*last\.ckpt was not written completely"):
        lc.resuming.from_pretrained_backbone(lc.SimCLR("small_convnet"), path)
