"""`ViewLogger`: pictures of originals and views, their destinations, and bit-identical training."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.callbacks import ViewAugmentation, ViewLogger
from lightning_contrast.callbacks.visualization import view_logger as implementation
from lightning_contrast.testing import assert_callback_changes_nothing, assert_resume_exact, run_processes
from tests.callbacks.picture_runs import MEAN, STD, Flip, Pixels, enlarged, events, fit, loader, pictures, tile
from tests.callbacks.probe_modules import images_and_labels, trainers

IMAGES = images_and_labels(24)[0]


def normalised(images):
    return Flip().eval_transform(images)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_originals_and_views_are_those_of_the_first_batch(order, dtype, tmp_path):
    callbacks = [ViewLogger(3), ViewAugmentation(Flip())]
    images = IMAGES if dtype == torch.uint8 else IMAGES / 255
    train = DataLoader(TensorDataset(images, torch.zeros(24)), batch_size=8)
    fit(callbacks if order == "before" else callbacks[::-1], train, folder=tmp_path, max_epochs=1)
    shown = pictures(tmp_path)
    assert list(shown) == ["views_step0000000.png"]
    picture = shown["views_step0000000.png"]
    assert picture.shape == (16 + 3 * 68 + 4, 3 * 68 + 4, 3)
    for row in range(3):
        assert np.array_equal(tile(picture, row, 0), enlarged(IMAGES[row], 8))
        assert np.array_equal(tile(picture, row, 1), enlarged(IMAGES[row].flip(1), 8))
        # A view of half the size fills half the tile.
        crop = tile(picture, row, 2)
        assert np.array_equal(crop[16:48, 16:48], enlarged(IMAGES[row, :, :4, :4], 8))
        assert (crop[:16] == 255).all()
    assert (picture[:16, 68:72] == 255).all()


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 3, 6]), (2, [0, 6]), (None, [0])])
def test_one_picture_for_each_epoch_or_once(every, steps, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logged = ViewLogger(2, every_n_epochs=every)
    fit([logged, ViewAugmentation(Flip())], folder=tmp_path, logger=logger, max_epochs=3)
    assert sorted(events(tmp_path)) == [("views", step) for step in steps]
    assert not pictures(tmp_path)  # a logger took them


def test_png_files_beside_a_logger(tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs")
    fit([ViewLogger(png_dir=tmp_path / "png")], folder=tmp_path, logger=logger, max_epochs=1)
    assert list(pictures(tmp_path / "png")) == ["views_step0000000.png"]
    assert np.array_equal(events(tmp_path / "logs")["views", 0], pictures(tmp_path / "png")["views_step0000000.png"])


def test_a_logger_without_pictures_gets_files_beside_its_own(tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    fit([ViewLogger()], folder=tmp_path / "root", logger=logger, max_epochs=1)
    assert list(pictures(logger.log_dir)) == ["views_step0000000.png"]
    assert not (tmp_path / "root" / "pictures").exists()


class Recorder(Logger):
    """Logger whose subclasses define how images are logged."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    @property
    def experiment(self):
        return None


class LikeWandB(Recorder):
    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append((key, images[0].size, step, len(images), kwargs))


class LikeMLFlow(Recorder):
    """MLflow's client takes the run id."""

    run_id = "run-7"

    @property
    def experiment(self):
        class Client:
            def log_image(client, run_id, image, artifact_file=None, key=None, step=None):
                self.calls.append((key, image.size, step, run_id, artifact_file))

        return Client()


class LikeComet(Recorder):
    @property
    def experiment(self):
        class Experiment:
            def log_image(experiment, image_data, name=None, step=None):
                self.calls.append((name, image_data.size, step))

        return Experiment()


@pytest.mark.parametrize(
    ("make", "rest"), [(LikeWandB, (1, {})), (LikeMLFlow, ("run-7", None)), (LikeComet, ())], ids=lambda x: str(x)
)
def test_other_loggers_get_pictures_in_their_own_way(make, rest, tmp_path):
    logger = make()
    fit([ViewLogger(2)], folder=tmp_path, logger=logger, max_epochs=1)
    assert logger.calls == [("views", (72, 156), 0, *rest)]
    assert not pictures(tmp_path)


def test_a_loader_of_views_has_no_originals(tmp_path):
    views = [normalised(IMAGES), normalised(IMAGES).flip(3)]
    train = DataLoader(
        TensorDataset(*views), batch_size=8, collate_fn=lambda rows: [torch.stack(v) for v in zip(*rows, strict=True)]
    )
    fit([ViewLogger(2, mean=MEAN, std=STD)], train, folder=tmp_path, max_epochs=1)
    picture = pictures(tmp_path)["views_step0000000.png"]
    assert picture.shape[1] == 2 * 68 + 4
    assert np.array_equal(tile(picture, 1, 1), enlarged(IMAGES[1].flip(2), 8))


def test_a_run_without_views_shows_its_images(tmp_path):
    fit([ViewLogger(9)], folder=tmp_path, max_epochs=1)  # a batch has 8
    picture = pictures(tmp_path)["views_step0000000.png"]
    assert picture.shape == (16 + 8 * 68 + 4, 72, 3)
    assert np.array_equal(tile(picture, 7, 0), enlarged(IMAGES[7], 8))


class AnyImages(Pixels):
    def training_step(self, batch, batch_idx):
        return self.out(torch.ones(1, 3)).sum()


def show(images, folder, **settings):
    train = DataLoader(TensorDataset(images), batch_size=4)
    fit([ViewLogger(2, **settings)], train, module=AnyImages(), folder=folder, limit_val_batches=0)
    return pictures(folder)["views_step0000000.png"]


@pytest.mark.parametrize(
    ("channels", "chosen", "settings"),
    [
        (1, [0, 0, 0], {}),
        (2, [0, 0, 0], {}),
        (5, [0, 1, 2], {}),
        (5, [4, 0, 2], {"channels": (4, 0, 2)}),
        (5, [3, 3, 3], {"channels": [3]}),
    ],
)
def test_images_of_any_number_of_channels(channels, chosen, settings, tmp_path):
    images = torch.randint(0, 256, (4, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(tile(show(images, tmp_path, **settings), 1, 0), enlarged(images[1, chosen], 8))


def test_values_outside_of_0_to_1_are_stretched_and_nan_is_black(tmp_path):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 6 - 2
    images[1] = images[1] / 20 + 0.5  # inside
    images[0, 0, 0, 0] = torch.nan
    shown = show(images, tmp_path)
    clean = images[0].nan_to_num(0)
    assert np.array_equal(tile(shown, 0, 0), enlarged((clean - clean.min()) / (clean.max() - clean.min()), 8))
    assert np.array_equal(tile(shown, 1, 0), enlarged(images[1], 8))


def test_large_images_are_made_smaller_and_keep_their_shape(tmp_path):
    images = torch.zeros(4, 3, 100, 448, dtype=torch.uint8)
    picture = show(images, tmp_path)
    assert picture.shape == (16 + 2 * 228 + 4, 232, 3)
    middle = tile(picture, 0, 0, edge=224)
    assert (middle[112 - 24 : 112 + 24] == 0).all()
    assert (middle[:86] == 255).all()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"samples": 0}, ValueError, "`samples` must be >= 1"),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` must be >= 1"),
        ({"name": ""}, ValueError, "`name`"),
        ({"channels": (0, 1)}, ValueError, "`channels` must have one or three entries"),
        ({"channels": (0, 1, -1)}, ValueError, "`channels` must be >= 0"),
        ({"mean": (0.5,)}, ValueError, "`mean` must be given with `std`"),
        ({"mean": (0.5,), "std": (0.0,)}, ValueError, "`std` must be > 0"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_arguments(settings, error, words):
    with pytest.raises(error, match=words):
        ViewLogger(**settings)


@pytest.mark.parametrize(
    ("images", "settings", "words"),
    [
        (torch.rand(4, 3, 8, 8), {"channels": (0, 1, 3)}, "`channels` must be < 3"),
        (torch.rand(4, 3, 8, 8), {"mean": (0.0, 0.0), "std": (1.0, 1.0)}, "`mean` must have 3 numbers"),
    ],
    ids=["channels", "mean"],
)
def test_what_does_not_fit_the_images_is_named(images, settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        show(images, tmp_path, **settings)


def test_the_strategy_is_left_as_it_was_and_a_second_fit_shows_again(tmp_path):
    callbacks = [ViewLogger(2), ViewAugmentation(Flip())]
    trainer = fit(callbacks, folder=tmp_path, max_epochs=1)
    assert "batch_to_device" not in vars(trainer.strategy)
    trainer.fit_loop.max_epochs = 2
    fit([], folder=tmp_path, trainer=trainer)
    assert "batch_to_device" not in vars(trainer.strategy)
    assert list(pictures(tmp_path)) == ["views_step0000000.png", "views_step0000003.png"]
    with pytest.raises(ValueError, match="`channels`"):
        fit([ViewLogger(channels=[9])], folder=tmp_path, max_epochs=1)


def test_a_resumed_run_does_not_show_its_views_twice(tmp_path):
    first = fit([ViewLogger(every_n_epochs=None)], folder=tmp_path / "a", max_epochs=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["ViewLogger[views]"]
    assert kept == {"shown": True}
    fit([ViewLogger(every_n_epochs=None)], folder=tmp_path / "b", ckpt_path=tmp_path / "a.ckpt")
    assert not pictures(tmp_path / "b")
    assert len(pictures(tmp_path / "a")) == 1


def test_in_a_pytorch_lightning_trainer(tmp_path):
    trainer, base = trainers()["pytorch_lightning"]

    class Foreign(base):
        training_step, validation_step = Pixels.training_step, Pixels.validation_step
        configure_optimizers, forward = Pixels.configure_optimizers, Pixels.forward

        def __init__(self):
            super().__init__()
            source = Pixels()
            self.backbone, self.out = source.backbone, source.out

    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [ViewLogger(2), ViewAugmentation(Flip())]
    run = trainer(callbacks=callbacks, default_root_dir=tmp_path, max_epochs=1, enable_model_summary=False, **settings)
    fit([], module=Foreign(), folder=tmp_path, trainer=run)
    assert np.array_equal(tile(pictures(tmp_path)["views_step0000000.png"], 0, 0), enlarged(IMAGES[0], 8))


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()


def test_nothing_changes_and_a_resumed_run_is_the_same(tmp_path):
    def watched():
        return ViewLogger(2, png_dir=tmp_path)

    assert_callback_changes_nothing(watched, Pixels, Data, lambda: [ViewAugmentation(Flip())])
    assert_resume_exact(Pixels, Data, lambda: [watched(), ViewAugmentation(Flip())])
    assert pictures(tmp_path)


def published_by_rank(rank, folder):
    calls = []
    implementation.publish = lambda *args: calls.append(args[1])  # in a process of its own
    logged = [ViewLogger(2, png_dir=folder), ViewAugmentation(Flip())]
    fit(logged, folder=folder, devices=2, strategy="ddp", max_epochs=1)
    return calls


@pytest.mark.dist
def test_two_ranks_change_nothing_and_the_first_alone_shows(tmp_path):
    assert run_processes(published_by_rank, 2, tmp_path, init=False) == [["views"], []]
    watched = lambda: ViewLogger(2, png_dir=tmp_path)  # noqa: E731
    assert_callback_changes_nothing(watched, Pixels, Data, lambda: [ViewAugmentation(Flip())], world_size=2)
