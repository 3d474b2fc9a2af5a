"""Pairs from tables and tar shards: contents, order, exact resume within an epoch, bad input named with its line."""

import csv
import io
import json
import tarfile

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

import lightning_contrast as lc
from lightning_contrast.data import ImageTextDataModule

ROWS = 23


def picture(number):
    return Image.fromarray(np.full((6, 9, 3), number, dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images whose pixels are their number, tables of them in four formats, and tar shards."""
    path = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(ROWS):
        picture(number).save(path / f"{number}.png")
        rows.append({"path": f"{number}.png", "caption": f'number, "{number}"\nand more', "other": "x"})
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (path / f"table{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    (path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.Table.from_pylist(rows), path / "table.parquet")
    for shard in range(4):
        with tarfile.open(path / f"shard-{shard}.tar", "w") as tar:
            for number in range(shard, ROWS, 4):
                image = io.BytesIO()
                picture(number).save(image, "png")
                add(tar, f"{number:03}.png", image.getvalue())
                if number % 2:
                    add(tar, f"{number:03}.txt", f"number {number}".encode())
                else:
                    add(tar, f"{number:03}.json", json.dumps({"caption": f"number {number}"}).encode())
    return path


def add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def module(*sources, **kwargs):
    return ImageTextDataModule(*sources, **{"size": 4, "batch_size": 4, "num_workers": 0} | kwargs)


def numbers(batch):
    """Return the numbers of the images of a batch, after checking that the texts belong to them."""
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape[1:] == (3, 4, 4)
    found = batch["image"].amax((1, 2, 3))
    assert torch.equal(found, batch["image"].amin((1, 2, 3)))
    assert len(batch["text"]) == len(found)
    assert all(str(number) in text for number, text in zip(found.tolist(), batch["text"], strict=True))
    return found.tolist()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_give_the_same_pairs_in_the_order_of_the_seed(folder, suffix):
    data = module(folder / f"table.{suffix}", folder / f"table.{suffix}")
    batches = list(data.train_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [numbers(batch) for batch in batches]
    seen = [number for batch in batches for number in numbers(batch)]
    assert len(seen) == len(set(seen)) == 20
    assert seen == [n for b in module(folder / "table.csv").train_dataloader() for n in numbers(b)]
    assert batches[0]["text"][0] == f'number, "{seen[0]}"\nand more'
    assert [n for batch in data.val_dataloader() for n in numbers(batch)] == list(range(ROWS))
    assert data.pairs()[3].path == str(folder / "3.png")


def test_shards_give_each_pair_once(folder):
    shards = f"{folder}/shard-{{0..3}}.tar"
    data = module(shards, shards, batch_size=1, shuffle_buffer=5)
    loader, epochs = data.train_dataloader(), []
    for epoch in range(2):
        loader._epoch = epoch
        epochs.append([n for batch in loader for n in numbers(batch)])
        assert sorted(epochs[-1]) == list(range(ROWS))
    assert epochs[0] != epochs[1] != list(range(ROWS))
    in_order = [n for shard in range(4) for n in range(shard, ROWS, 4)]
    assert [n for batch in data.val_dataloader() for n in numbers(batch)] == in_order


class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, tuple(numbers(batch))))
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class SaveAt(L.Callback):
    """Saves a checkpoint after a number of steps, in the hook of a batch or in that of its epoch."""

    def __init__(self, path, step, *, at_epoch_end=False):
        self.path, self.step, self.at_epoch_end = path, step, at_epoch_end

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.at_epoch_end:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *_):
        if trainer.global_step == self.step and self.at_epoch_end:
            trainer.save_checkpoint(self.path)


def fit(data, checkpoint=None, callbacks=(), **kwargs):
    model = Recorder()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **quiet, **kwargs)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    return model.seen


KINDS = {
    "table": {},
    "shards": {"batches_per_epoch": 7},
    "shards, workers": {"batches_per_epoch": 7, "num_workers": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [3, 4, 5, 7, 10])
@pytest.mark.slow
def test_a_run_resumes_at_the_same_batch(folder, tmp_path, kind, stop):
    source = folder / "table.csv" if kind == "table" else f"{folder}/shard-{{0..3}}.tar"
    make = lambda: module(source, seed=2, shuffle_buffer=6, **KINDS[kind]) if kind != "table" else module(source)  # noqa: E731
    whole = fit(make(), callbacks=[SaveAt(tmp_path / "middle.ckpt", stop)], max_epochs=3)
    resumed = fit(make(), tmp_path / "middle.ckpt", max_epochs=3)
    assert resumed == whole[stop:]
    assert len({row for _, _, row in whole}) > 1


def test_shards_of_unknown_length_resume_only_between_epochs(folder, tmp_path):
    shards = f"{folder}/shard-{{0..3}}.tar"
    savers = [SaveAt(tmp_path / "middle.ckpt", 3), SaveAt(tmp_path / "end.ckpt", 5, at_epoch_end=True)]
    whole = fit(module(shards), callbacks=savers, max_epochs=3)
    assert len(whole) == 15
    with pytest.raises(ValueError, match="Set `batches_per_epoch`, or resume from a checkpoint at the end"):
        fit(module(shards), tmp_path / "middle.ckpt", max_epochs=3)
    assert fit(module(shards), tmp_path / "end.ckpt", max_epochs=3) == whole[5:]


def test_another_layout_is_refused_within_an_epoch(folder):
    state = module(f"{folder}/shard-{{0..3}}.tar", batches_per_epoch=7).train_dataloader().state_dict()
    other = module(f"{folder}/shard-{{0..3}}.tar", batch_size=2, batches_per_epoch=7).train_dataloader()
    other.load_state_dict(state | {"position": 2})
    with pytest.raises(ValueError, match="must resume with the same data layout"):
        next(iter(other))


def test_two_processes_read_different_shards(folder):
    seen = []
    for rank in range(2):
        data = module(f"{folder}/shard-{{0..3}}.tar", batch_size=2, batches_per_epoch=5, shuffle_buffer=0)
        dataset = data.train_dataloader().dataset
        dataset.rank, dataset.replicas = rank, 2
        seen.append([n for batch in torch.utils.data.DataLoader(dataset, 2, collate_fn=list) for _, n in batch])
    assert len(seen[0]) == len(seen[1]) == 10
    assert not set(seen[0]) & set(seen[1])


BAD_ROWS = {
    "path,caption\n0.png,zero\nno.png,one\n": (FileNotFoundError, r"`bad.csv, line 3` must name an existing image"),
    'path,caption\n0.png,"zero\nand"\n1.png, \n': (ValueError, r"`bad.csv, line 4` must not be empty"),
    "path,title\n0.png,zero\n": (ValueError, r"`bad.csv, line 2` must have a value in the column 'caption'.*title"),
    "path,caption\n0.png\n": (ValueError, r"`bad.csv, line 2` must have a value in the column 'caption'"),
    "path,caption\n ,zero\n": (ValueError, r"`bad.csv, line 2` must name an image"),
    "path,caption\n": (ValueError, "`table` must hold at least one row"),
    "": (ValueError, "`table` must hold at least one row"),
}


@pytest.mark.parametrize("text", BAD_ROWS)
def test_a_bad_row_is_named_with_its_line(folder, tmp_path, text):
    (tmp_path / "bad.csv").write_text(text)
    error, message = BAD_ROWS[text]
    with pytest.raises(error, match=message):
        module(tmp_path / "bad.csv", root=folder).setup()


@pytest.mark.parametrize(("line", "message"), [("[1]", "be a JSON object"), ("{x", "be a JSON object")])
def test_a_bad_json_line_is_named(folder, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text('{"path": "0.png", "caption": "zero"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"`bad.jsonl, line 3` must {message}"):
        module(tmp_path / "bad.jsonl", root=folder).setup()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"x"}, "sample a` must have a caption"),
        ({"a.txt": b"x"}, "sample a` must have an image"),
        ({"a.png": b"x", "a.txt": b"cat"}, "Cannot read the image of .*sample a"),
        ({"a.png": None, "a.txt": b" "}, "sample a` must not be empty"),
        ({"a.png": None, "a.json": b'{"text": "cat"}'}, "sample a` must be a string, got 'NoneType'"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, files, message):
    image = io.BytesIO()
    picture(3).save(image, "png")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, content in files.items():
            add(tar, name, image.getvalue() if content is None else content)
    with pytest.raises((ValueError, RuntimeError, TypeError), match=message):
        list(module(str(tmp_path / "bad.tar"), batch_size=1).train_dataloader())


def test_bad_arguments_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="`batches_per_epoch` must be left out for tables"):
        module(folder / "table.csv", batches_per_epoch=3)
    with pytest.raises(ValueError, match="`loader` must be left out for tar shards"):
        module("a.tar", loader=lambda path: path)
    with pytest.raises(FileNotFoundError, match="`train` must name existing tar files"):
        module(str(tmp_path / "none-{0..2}.tar")).setup()
    with pytest.raises(FileNotFoundError, match="`table` must be a file"):
        module(tmp_path / "none.csv").setup()
    with pytest.raises(ValueError, match=r"`table` must be one of '.csv', '.tsv', '.jsonl', '.parquet', got '.png'"):
        module(folder / "0.png").setup()
    with pytest.raises(ValueError, match="`train` must have a shard for each of 9 readers, got 4"):
        module(f"{folder}/shard-{{0..3}}.tar", num_workers=9).train_dataloader()


@pytest.mark.parametrize("source", ["table.csv", "shard-{0..3}.tar"])
def test_image_views_are_cut_from_whole_images(folder, source):
    """The images are 9 x 6 pixels; a Trainer without `ViewAugmentation` gets squares, validation always does."""

    class Shapes(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch, batch_idx):
            self.seen.append(batch["image"])
            return self.layer(torch.ones(1, 1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Seen:
        def __call__(self, images):
            return [images.float()]

        def eval_transform(self, images):
            return images.float()

    given = []

    class Recorded(lc.ViewAugmentation):
        def _views(self, images):
            given.append(images)
            return super()._views(images)

    options = {} if source.endswith("csv") else {"batches_per_epoch": 2}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    for callbacks in ([Recorded(Seen())], []):
        model, data = Shapes(), module(f"{folder}/{source}", **options)
        L.Trainer(accelerator="cpu", logger=False, max_steps=2, callbacks=callbacks, **quiet).fit(
            model, datamodule=data
        )
        assert [type(images) for images in model.seen] == [torch.Tensor] * 2
        assert all(images.shape == (4, 3, 4, 4) for images in model.seen)
    assert [images.sizes.tolist() for images in given] == [[[6, 9]] * 4] * 2
    assert (
        type(next(iter(module(folder / "table.csv", folder / "table.csv").val_dataloader()))["image"]) is torch.Tensor
    )
