"""`EmbeddingLogger`: projector, map and neighbors of validation images, and bit-identical training."""

import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from google.protobuf import text_format
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.callbacks import EmbeddingLogger, ViewAugmentation
from lightning_contrast.callbacks.visualization.projector import add_snapshot
from lightning_contrast.callbacks.visualization.sample import Sample, SampleShare
from lightning_contrast.callbacks.visualization.scatter import project_features
from lightning_contrast.testing import assert_callback_changes_nothing, assert_resume_exact, run_processes
from tests.callbacks.picture_runs import Flip, Pixels, enlarged, events, fit, loader, pictures, tile
from tests.callbacks.probe_modules import adversary, classifier, images_and_labels, labelled, trainers
from tests.tolerances import NETWORK, ROUNDED, TRAINING, f32

VAL, LABELS = images_and_labels(24, seed=5)
SAME, OTHER = (46, 160, 67), (218, 54, 51)


def read_projector(folder):
    """Return features, metadata lines, sprite and thumbnail size of each projector entry of a run, by name."""
    (path,) = Path(folder).rglob("projector_config.pbtxt")
    config = text_format.Parse(path.read_text(), ProjectorConfig())
    found = {}
    for entry in config.embeddings:
        rows = np.loadtxt(path.parent / entry.tensor_path, delimiter="\t", ndmin=2)
        if not entry.metadata_path:
            found[entry.tensor_name] = (rows, [], None, [])
            continue
        words = (path.parent / entry.metadata_path).read_text().splitlines()
        sprite = np.asarray(Image.open(path.parent / entry.sprite.image_path))
        found[entry.tensor_name] = (rows, words, sprite, list(entry.sprite.single_image_dim))
    return found


def colors(images):
    """Return the features of `Pixels` for uint8 images: mean colors in 0..255."""
    return images.double().mean(dim=(2, 3))


def logged(**settings):
    """Return an EmbeddingLogger without a map, which is slow to draw."""
    return EmbeddingLogger(**({"layout": None} | settings))


def test_projector_has_features_labels_and_pictures(tmp_path):
    callback = logged(class_names=["dark", "grey\tish", "light"], queries=0)
    fit([callback], folder=tmp_path, logger=TensorBoardLogger(tmp_path), max_epochs=1)
    ((name, (rows, words, sprite, size)),) = read_projector(tmp_path).items()
    assert name == "embeddings:00003"
    assert np.allclose(rows, colors(VAL), **f32(NETWORK, size=0))
    names = ["dark", "grey ish", "light"]
    assert words == ["label\timage", *(f"{names[label]}\t{i}" for i, label in enumerate(LABELS))]
    assert size == [64, 64]
    assert sprite.shape == (5 * 64, 5 * 64, 3)
    for i in range(24):
        top, left = i // 5 * 64, i % 5 * 64
        assert np.array_equal(sprite[top : top + 64, left : left + 64], enlarged(VAL[i], 8))
    assert (sprite[4 * 64 :, 4 * 64 :] == 0).all()


def test_projector_keeps_the_first_and_the_newest_snapshots(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    theirs = torch.rand(4, 3)
    logger.experiment.add_embedding(theirs, tag="theirs", global_step=1)
    fit([logged(queries=0), logged(queries=0, name="val/b")], folder=tmp_path, logger=logger, max_epochs=7)
    steps = (3, 12, 15, 18, 21)
    ours = [f"{name}:{step:05d}" for step in steps for name in ("embeddings", "val/b")]
    found = read_projector(tmp_path)
    assert sorted(found) == sorted([*ours, "theirs:00001"])
    assert np.allclose(found["theirs:00001"][0], theirs, **f32(ROUNDED))
    folders = {path.name for path in Path(logger.log_dir).iterdir() if path.is_dir()}
    assert folders == {"00001", *(f"{step:05d}" for step in steps)}
    assert len(list(Path(logger.log_dir).rglob("sprite.png"))) == 10


def small_sample(scale=1):
    return Sample(torch.eye(3) * scale, torch.full((3, 3, 4, 4), 7, dtype=torch.uint8), None, torch.arange(3))


def test_a_step_that_is_written_again_replaces_the_first(tmp_path, capsys):
    writer = TensorBoardLogger(tmp_path).experiment
    for scale in (1, 2):
        add_snapshot(writer, "e", 5, small_sample(scale), None, keep=2)
    ((rows, words, sprite, size),) = read_projector(tmp_path).values()
    assert np.array_equal(rows, 2 * np.eye(3))
    assert (words, size) == (["0", "1", "2"], [4, 4])  # one column has no heading
    assert (sprite[:4] == 7).all()
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("count", "steps"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 3, 4]), (6, [1, 5, 6])])
def test_a_new_writer_keeps_the_snapshots_of_the_last_one(count, steps, tmp_path):
    for step in range(1, count + 1):
        writer = TensorBoardLogger(tmp_path, name="", version="").experiment
        add_snapshot(writer, "e", step, small_sample(), None, keep=3)
    assert list(read_projector(tmp_path)) == [f"e:{step:05d}" for step in steps]


def nearest(images, row, count):
    """Return the indices of the images with the most similar mean colors, in plain loops."""
    features = colors(images).tolist()
    norm = [sum(x * x for x in f) ** 0.5 for f in features]
    cosine = [
        sum(a * b for a, b in zip(features[row], f, strict=True)) / norm[row] / n
        for f, n in zip(features, norm, strict=True)
    ]
    return sorted((i for i in range(len(features)) if i != row), key=lambda i: -cosine[i])[:count]


def test_neighbours_are_the_most_similar_images(tmp_path):
    fit([logged(queries=3, neighbours=4)], folder=tmp_path, max_epochs=1)
    shown = pictures(tmp_path)
    assert list(shown) == ["embeddings_neighbours_step0000003.png"]
    picture = shown["embeddings_neighbours_step0000003.png"]
    margin = 7 * len("epoch 0") + 4
    assert picture.shape == (16 + 3 * 68 + 2 * 8 + 4, margin + 5 * 68 + 4, 3)
    for number, query in enumerate((0, 8, 16)):
        top = 16 + number * 8
        assert np.array_equal(tile(picture, number, 0, left=margin, top=top), enlarged(VAL[query], 8))
        for column, row in enumerate(nearest(VAL, query, 4), 1):
            at = {"left": margin, "top": top}
            assert np.array_equal(tile(picture, number, column, **at), enlarged(VAL[row], 8)), (query, column)
            frame = picture[top + number * 68 + 30, margin + 4 + column * 68 - 1]
            assert tuple(frame) == (SAME if LABELS[row] == LABELS[query] else OTHER)


@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
def test_queries_are_followed_though_the_order_of_the_images_changes(tmp_path):
    callback = logged(queries=2, neighbours=3)
    shuffled = DataLoader(TensorDataset(VAL, LABELS), batch_size=8, shuffle=True, generator=torch.Generator())
    fit([callback], val=shuffled, folder=tmp_path, max_epochs=8)
    assert [when for when, _ in callback._neighbors.history] == ["epoch 0", *(f"epoch {e}" for e in range(4, 8))]
    first = callback._neighbors.history[0].ids
    for _, neighbours in callback._neighbors.history:
        assert torch.equal(neighbours, first)  # `Pixels` does not learn features
    last = pictures(tmp_path)["embeddings_neighbours_step0000024.png"]
    assert last.shape[0] == 16 + 10 * 68 + 8 + 4
    for row in range(1, 5):  # of the first query: a row for each measurement
        assert np.array_equal(tile(last, row, 1, left=53), tile(last, 0, 1, left=53))


def test_queries_that_are_gone_are_named(tmp_path):
    class Other(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(seed=5 if self.trainer.current_epoch == 0 else 6)

    with pytest.warns(UserWarning, match="2 of the queries are no longer in the sample"):
        fit_data(logged(queries=2), Other(), tmp_path, reload_dataloaders_every_n_epochs=1)
    assert len(pictures(tmp_path)) == 2


def fit_data(callback, data, folder, **settings):
    from tests.callbacks.step_modules import QUIET

    trainer = L.Trainer(callbacks=[callback], default_root_dir=folder, max_epochs=2, **QUIET | settings)
    trainer.fit(Pixels(), data)
    return trainer


def test_the_map_has_the_principal_components_and_every_picture(tmp_path):
    fit([EmbeddingLogger(queries=0)], folder=tmp_path, max_epochs=1)
    picture = pictures(tmp_path)["embeddings_map_step0000003.png"]
    assert picture.shape == (720, 1440, 3)
    # The brightest and the darkest pixel of the images are on the left, the classes' first two colors on the right.
    left, right = picture[:, :720].reshape(-1, 3), picture[:, 720:].reshape(-1, 3)
    for color in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):
        assert (right == color).all(axis=1).sum() > 50
        assert (left == color).all(axis=1).sum() < 5


def test_principal_components_are_those_of_numpy():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 1, 3, 1, 1, 1.0]) + 2
    places, words = project_features(features, "pca")
    rows = features.numpy().astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows -= rows.mean(axis=0)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    for axis in range(2):
        direction = vectors[:, -1 - axis]
        direction *= np.sign(direction[np.abs(direction).argmax()])
        assert np.allclose(places[:, axis], rows @ direction, **f32(ROUNDED))
        assert words[axis] == f"component {axis + 1}, {values[-1 - axis] / values.sum():.0%} of the variance"


def test_other_layouts():
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first, second = (project_features(features, "tsne")[0] for _ in range(2))
    assert torch.equal(first, second)
    noisy = project_features(features, lambda f: torch.randn(len(f), 2) + np.random.rand())[0]
    assert noisy.shape == (12, 2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    with pytest.raises(ValueError, match=r"`layout` must return \(12, 2\), got \(12, 5\)"):
        project_features(features, lambda f: f)


@pytest.mark.parametrize(("layout", "package"), [("pca", "matplotlib"), ("tsne", "sklearn")])
def test_a_missing_package_is_named_with_its_extra(layout, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*\[demo\]"):
        EmbeddingLogger(layout=layout)
    EmbeddingLogger(layout=None)


@pytest.mark.parametrize(("total", "batch", "limit"), [(100, 8, 10), (24, 8, 24), (7, 4, 24), (1000, 10, 999)])
def test_a_sample_is_spread_over_the_whole_set(total, batch, limit):
    share = SampleShare(limit, -(-total // batch))
    found = [place for start in range(0, total, batch) for _, place in share.choose(min(batch, total - start))]
    assert len(found) == len(set(found)) <= limit
    assert len(found) >= min(total, limit) - 1 - limit * batch / total
    gaps = np.diff([-1, *found, total])
    assert gaps.max() <= -(-total // limit) + batch


def test_where_nobody_knows_the_number_of_batches_the_first_images_are_taken():
    share = SampleShare(10, float("inf"))
    assert [place for _ in range(3) for _, place in share.choose(8)] == list(range(10))


def test_normalisation_is_undone_and_the_first_loader_is_shown(tmp_path):
    callback = logged(queries=1, neighbours=1)
    fit([callback, ViewAugmentation(Flip())], val=[loader(seed=5), loader(seed=6)], folder=tmp_path, max_epochs=1)
    picture = pictures(tmp_path)["embeddings_neighbours_step0000003.png"]
    assert np.array_equal(tile(picture, 0, 0, left=53), enlarged(VAL[0], 8))


def test_a_loader_of_its_own_is_encoded_in_eval_mode(tmp_path):
    data = DataLoader(TensorDataset(VAL.float() / 255), batch_size=5)  # without labels
    model = classifier()()
    logger = TensorBoardLogger(tmp_path)
    callback = logged(dataloader=data, samples=12, queries=2)
    fit([callback], labelled(), module=model, folder=tmp_path, logger=logger, limit_val_batches=0, max_epochs=1)
    ((rows, words, _, _),) = read_projector(tmp_path).values()
    assert words == [str(i) for i in range(12)]
    model.eval()
    with torch.no_grad():
        assert np.allclose(rows, model.backbone(VAL[::2].float() / 255), **f32(TRAINING, size=0.01))
    assert [tag for tag, _ in events(tmp_path)] == ["embeddings/neighbours"]


class Broken(Pixels):
    """Some features are NaN."""

    bad = 2

    def __init__(self):
        super().__init__()
        self.backbone.append(Spoil(self.bad))


class Spoil(nn.Module):
    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def forward(self, features):
        rows = torch.arange(len(features)) < (self.bad if not self.training else 0)
        return features.masked_fill(rows.unsqueeze(1), torch.nan)


def test_nan_features_are_named_and_left_out(tmp_path):
    with pytest.warns(UserWarning, match=r"the features 'backbone' of 6 of 24 images are NaN") as caught:
        fit([logged()], module=Broken(), folder=tmp_path, logger=TensorBoardLogger(tmp_path))
    assert sum("are NaN" in str(warning.message) for warning in caught) == 1  # of two measurements
    assert all(len(rows) == 18 for rows, *_ in read_projector(tmp_path).values())


def test_nothing_is_shown_where_all_features_are_nan(tmp_path):
    class Lost(Broken):
        bad = 8

    with pytest.warns(UserWarning, match="24 of 24"):
        fit([EmbeddingLogger()], module=Lost(), folder=tmp_path)
    assert not pictures(tmp_path)


def test_an_unknown_layer_is_named_with_near_ones(tmp_path):
    with pytest.raises(
        ValueError, match=r"`features` must name a submodule of Pixels, got 'backbon'. Near names: 'backbone'"
    ):
        fit([EmbeddingLogger("backbon")], folder=tmp_path)


def test_a_run_without_validation_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"`embeddings` has no images.*`dataloader=`"):
        fit([EmbeddingLogger()], folder=tmp_path, limit_val_batches=0, max_epochs=1)
    assert not pictures(tmp_path)


def test_an_empty_loader_of_its_own_is_named(tmp_path):
    class Empty:
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match="must yield at least one batch"):
        fit([logged(dataloader=Empty())], folder=tmp_path, limit_val_batches=0, max_epochs=1)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"samples": 2}, ValueError, "`samples` must be >= 3"),
        ({"every_n_validations": 0}, ValueError, "`every_n_validations` must be >= 1"),
        ({"queries": -1}, ValueError, "`queries` must be >= 0"),
        ({"neighbours": 0}, ValueError, "`neighbours` must be >= 1"),
        ({"layout": "tsn"}, ValueError, "Did you mean 'tsne'"),
        ({"name": ""}, ValueError, "`name`"),
        ({"dataloader": 3}, TypeError, "`dataloader` must be a DataModule or a loader"),
        ({"features": 3}, TypeError, "`features`"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_arguments(settings, error, words):
    with pytest.raises(error, match=words):
        EmbeddingLogger(**settings)


def test_every_nth_validation_and_a_second_fit(tmp_path):
    callback = logged(every_n_validations=3)
    trainer = fit([callback], folder=tmp_path, max_epochs=5)
    steps = [3, 12]
    assert list(pictures(tmp_path)) == [f"embeddings_neighbours_step{step:07d}.png" for step in steps]
    trainer.fit_loop.max_epochs = 6
    fit([], folder=tmp_path, trainer=trainer)
    assert list(pictures(tmp_path))[-1] == "embeddings_neighbours_step0000018.png"
    assert [entry.when for entry in callback._neighbors.history] == ["epoch 5"]
    assert not any(module._forward_hooks for module in trainer.lightning_module.modules())


def test_a_resumed_run_goes_on_with_the_same_queries(tmp_path):
    def run(folder, **settings):
        callback = logged(queries=2, neighbours=2)
        return callback, fit([callback], folder=tmp_path / folder, **settings)

    whole, _ = run("whole", max_epochs=3)
    _, stopped = run("stopped", max_epochs=1)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = run("resumed", max_epochs=3, ckpt_path=tmp_path / "stopped.ckpt")
    a, b = (pictures(tmp_path / name)["embeddings_neighbours_step0000009.png"] for name in ("whole", "resumed"))
    assert np.array_equal(a, b)
    assert len(whole._neighbors.history) == len(resumed._neighbors.history) == 3


@pytest.mark.parametrize("make", [classifier, adversary], ids=lambda make: make.__name__)
@pytest.mark.parametrize("library", ["lightning", "pytorch_lightning"])
def test_foreign_modules_in_both_libraries(make, library, tmp_path):
    trainer, base = trainers()[library]
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = trainer(
        callbacks=[logged(features="backbone.0")],
        default_root_dir=tmp_path,
        max_epochs=1,
        enable_model_summary=False,
        **settings,
    )
    fit([], labelled(), labelled(24, seed=5), module=make(base)(), folder=tmp_path, trainer=run)
    assert len(pictures(tmp_path)) == 1


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(seed=5)


@pytest.mark.slow
def test_nothing_changes_and_a_resumed_run_is_the_same(tmp_path):
    def watched():
        data = DataLoader(TensorDataset(VAL.float() / 255), batch_size=8, shuffle=True)
        return [EmbeddingLogger(samples=20), logged(name="own", dataloader=data, png_dir=tmp_path)]

    for number in range(2):
        assert_callback_changes_nothing(lambda: watched()[number])  # noqa: B023 (called at once)
    assert_resume_exact(Pixels, Data, watched)
    assert pictures(tmp_path)


def samples_of(rank, folder):
    seen = []
    callback = logged(samples=32, queries=2)
    callback._log = lambda trainer, sample: seen.append((sample.ids, sample.features, sample.labels))
    settings = {} if rank is None else {"devices": 2, "strategy": "ddp"}
    fit([callback], folder=folder, max_epochs=1, **settings)
    return seen


@pytest.mark.dist
def test_two_ranks_change_nothing_and_the_first_shows_the_images_of_both(tmp_path):
    first, second = run_processes(samples_of, 2, tmp_path, init=False)
    assert second == []
    alone = samples_of(None, tmp_path)
    assert len(alone) == len(first) == 1
    for of_two, of_one in zip(first[0], alone[0], strict=True):
        assert torch.equal(of_two, of_one)
    assert len(alone[0][0]) == 24
    assert_callback_changes_nothing(lambda: logged(png_dir=tmp_path), world_size=2)
