"""Which images, weights, mode and labels the figure of a probe is made of."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import lightning_contrast as lc
from lightning_contrast import evaluation
from lightning_contrast.callbacks import OnlineKNN, OnlineLinearProbe
from lightning_contrast.callbacks.capture.labels import UnreadableBatchError, find_images
from lightning_contrast.callbacks.capture.sampling import drawn_rows, draws_whole_set
from tests.callbacks.probe_modules import (
    CLASSES,
    equal_states,
    images_and_labels,
    labelled,
    quiet_fit,
    quiet_trainer,
)
from tests.methods.cases import make
from tests.tolerances import NETWORK, ROUNDED, f32, near


class Turning(L.LightningModule):
    """Its weights are another random map after each step, so that features of two moments do not compare."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 16, bias=False))

    def forward(self, images):
        return self.backbone(images)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean() * 0

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    test_step = validation_step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        seed = torch.Generator().manual_seed(self.global_step)
        with torch.no_grad():
            self.backbone[1].weight.copy_(torch.randn(16, 192, generator=seed))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def clustered(count=48, seed=0):
    """Return a loader of images near one of three centers, which every linear map keeps apart."""
    centers = torch.rand(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % CLASSES
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset((centers[labels] + 0.05 * noise).clamp(0, 1), labels), batch_size=8)


def first_weights(average, current, count):
    return average


# Which weights.


@pytest.mark.parametrize("source", [{}, {"dataloader": clustered(40, seed=8)}], ids=["run", "loader"])
@pytest.mark.parametrize("last", [False, True])
def test_bank_and_queries_come_from_the_averaged_weights_in_any_order_of_callbacks(source, last):
    probes = [OnlineKNN(CLASSES, k=1, **source), OnlineLinearProbe(CLASSES, **source)]
    average = [WeightAveraging(avg_fn=first_weights)]
    callbacks = average + probes if last else probes + average
    run = quiet_fit(Turning(), callbacks, clustered(), clustered(24, seed=5), max_epochs=1)
    assert run.callback_metrics["knn/top1"] > 0.9
    assert run.callback_metrics["linear_probe/top1"] > 0.9


def test_a_train_bank_beside_averaged_weights_is_a_warning():
    callbacks = [OnlineKNN(CLASSES, bank="train"), WeightAveraging(avg_fn=first_weights)]
    with pytest.warns(UserWarning, match='`knn`: with `bank="train"` it compares features of the training weights'):
        quiet_fit(Turning(), callbacks, labelled(), max_epochs=1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_is_judged_with_its_own_weights(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    probes = [
        OnlineKNN(CLASSES, k=1),
        OnlineLinearProbe(CLASSES),
        OnlineKNN(CLASSES, k=1, bank="train", name="train"),
    ]
    module = Turning()
    callbacks, val = [*probes, save], clustered(24, seed=5)
    trainer = quiet_fit(module, callbacks, clustered(), val, max_epochs=2, enable_checkpointing=True)
    with pytest.warns(UserWarning, match='`train`: the bank "train" is empty'):
        found = trainer.test(module, val, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)[0]
    assert found["knn/test_top1"] > 0.9
    assert found["linear_probe/test_top1"] > 0.9
    assert "train/test_top1" not in found
    fresh = quiet_trainer([OnlineLinearProbe(CLASSES)])
    with pytest.warns(UserWarning, match="`linear_probe`: there is no training set to encode"):
        again = fresh.test(Turning(), val, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)[0]
    assert again["linear_probe/test_top1"] == found["linear_probe/test_top1"]  # the classifier of the checkpoint


# Which images.

DATA = TensorDataset(torch.arange(12))


@pytest.mark.parametrize(
    ("loader", "rows"),
    [
        (DataLoader(DATA, 4), range(12)),
        (DataLoader(DATA, 5, shuffle=True, drop_last=True), range(12)),
        (DataLoader(DATA, 4, sampler=DistributedSampler(DATA, 2, 1)), range(12)),
        (DataLoader(DATA, batch_size=None), range(12)),
        (DataLoader(DATA, 4, sampler=SubsetRandomSampler([9, 2, 5])), [2, 5, 9]),
        (DataLoader(DATA, 4, sampler=SequentialSampler(range(4))), range(4)),
        (DataLoader(DATA, 4, sampler=[3, 3, 1]), [1, 3]),
        (DataLoader(DATA, 4, sampler=WeightedRandomSampler([0.0] * 10 + [1.0, 1.0], 30)), [10, 11]),
        (DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler([7, 8]), 2, False)), [7, 8]),
        (DataLoader(DATA, batch_sampler=[[4, 0], [1]]), [0, 1, 4]),
        (DataLoader(DATA, 4, sampler=RandomSampler(DATA, num_samples=5, generator=torch.Generator())), None),
    ],
)
def test_the_rows_that_a_loader_draws_are_read_from_its_sampler(loader, rows):
    generator = getattr(loader.sampler, "generator", None)
    states = torch.get_rng_state(), None if generator is None else generator.get_state()
    found = drawn_rows(loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert generator is None or torch.equal(generator.get_state(), states[1])
    assert found == drawn_rows(loader)
    if rows is None:
        assert len(found) == len(set(found)) == 5
    else:
        assert found == list(rows)
    assert draws_whole_set(loader) == (rows == range(12))


@pytest.mark.parametrize("own", [False, True])
def test_images_that_the_sampler_leaves_out_do_not_vote(own):
    images, _ = images_and_labels(200)
    noise = torch.randint(0, CLASSES, (200,), generator=torch.Generator().manual_seed(3))
    data = TensorDataset(images.float() / 255, noise)
    halves = [DataLoader(data, 20, sampler=SubsetRandomSampler(rows)) for rows in torch.randperm(200).split(100)]
    bank = {"dataloader": halves[0]} if own else {}
    run = quiet_fit(Turning(), [OnlineKNN(CLASSES, k=1, **bank)], *halves, max_epochs=1)
    assert run.callback_metrics["knn/top1"] < 0.6  # 1.0 if the images of validation vote for themselves


class Counting(Turning):
    """Counts the images of its forward passes without gradient."""

    encoded = 0

    def forward(self, images):
        self.encoded += 0 if torch.is_grad_enabled() else len(images)
        return super().forward(images)


@pytest.mark.parametrize(("max_bank", "bank"), [(65_536, 48), (20, 20)])
def test_a_validation_encodes_the_bank_once_for_all_probes(max_bank, bank):
    def encoded(epochs):
        module = Counting()
        probes = [OnlineKNN(CLASSES, k=1, max_bank=max_bank), OnlineLinearProbe(CLASSES, max_bank=max_bank)]
        quiet_fit(module, probes, clustered(), clustered(24, seed=5), max_epochs=epochs, num_sanity_val_steps=0)
        return module.encoded

    assert encoded(3) - encoded(2) == bank + 24
    assert encoded(1) == bank + 24 + 2 * 8  # once in a run each probe encodes a validation batch again, to compare


# Which mode and transform: the figures of an offline evaluation of the same weights.


def emoji_run(callbacks, **kwargs):
    data = lc.data.EmojiDataModule(batch_size=128)
    policy = lc.augment.simclr_views(32)
    torch.manual_seed(0)
    model = lc.SimCLR("small_convnet", warmup_epochs=0)
    trainer = quiet_trainer([lc.ViewAugmentation(policy, seed=0), *callbacks], max_epochs=1, **kwargs)
    trainer.fit(model, datamodule=data)
    features = [evaluation.encode(model, data.images(split), policy.eval_transform) for split in ("train", "val")]
    return trainer.callback_metrics, (features[0], data.labels("train"), features[1], data.labels("val"))


@pytest.mark.slow
def test_the_default_figures_are_those_of_an_offline_evaluation():
    found, split = emoji_run([OnlineKNN(9, top_k=5), OnlineLinearProbe(9)], limit_train_batches=8)
    assert found["knn/top1"].item() == near(evaluation.knn_top1(*split, num_classes=9))
    assert found["linear_probe/top1"].item() == pytest.approx(evaluation.linear_top1(*split), abs=0.005)
    assert found["knn/top5"] > found["knn/top1"]
    assert abs(found["linear_probe/train_top1"] - found["linear_probe/top1"]) > 0.1  # that of the augmented images


# Which layer.


class Sees(OnlineKNN):
    """Notes the features that it is asked about, and the images of the last batch."""

    def predict(self, features, layer=""):
        self.features = features.clone()
        return super().predict(features, layer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.batch = batch[0]


@pytest.mark.parametrize(
    ("make", "layer", "right"),
    [
        (
            lambda: lc.SimSiam("small_convnet", projection_dim=192, predictor_dim=64, warmup_epochs=0),
            "predictor",
            lambda m, x: m.predictor(m.projector(m.backbone(x))),
        ),
        (
            lambda: lc.BYOL("small_convnet", hidden_dim=64, projection_dim=32, warmup_epochs=0, momentum=0.5, lr=0.5),
            "momentum_projector",
            lambda m, x: m.momentum_projector(m.momentum_backbone(x)),
        ),
        (
            lambda: lc.MoCo("small_convnet", queue_size=32, batchnorm_splits=4, warmup_epochs=0),
            "momentum_backbone",
            lambda m, x: m.momentum_backbone(x),
        ),
    ],
    ids=["predictor", "momentum projector", "momentum backbone"],
)
def test_a_layer_gets_its_own_input(make, layer, right):
    torch.manual_seed(0)
    module, probe = make(), Sees(CLASSES, features=layer)
    images, labels = images_and_labels(32)
    loader = DataLoader(TensorDataset(images.repeat_interleave(2, 2).repeat_interleave(2, 3), labels), 16)
    callbacks = [lc.ViewAugmentation(lc.augment.byol_views(16), seed=0), probe]
    run = quiet_fit(module, [*callbacks, OnlineLinearProbe(CLASSES, features=layer)], loader, loader, max_epochs=1)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(probe.features, right(module, probe.batch), **f32(NETWORK))
    assert {"knn/top1", "linear_probe/top1"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("name", ["IBOT", "DINOv2", "MSN", "IJEPA"])
@pytest.mark.slow
def test_a_teacher_and_whole_images_of_a_method_that_leaves_patches_out(name):
    images, labels = images_and_labels(72)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    train, val = ((images[:48], labels[:48]), (images[48:], labels[48:]))
    loaders = [DataLoader(TensorDataset(*split), 16) for split in (train, val)]
    policy = lc.augment.ijepa_views(16) if name == "IJEPA" else lc.augment.byol_views(16)

    def run(**kwargs):
        module = make(name, momentum=0.5)
        probes = [OnlineKNN(CLASSES, k=5, **kwargs), OnlineLinearProbe(CLASSES, **kwargs)]
        return module, quiet_fit(module, [lc.ViewAugmentation(policy), *probes], *loaders, max_epochs=1)

    module, trainer = run(features=["backbone", "momentum_backbone"])
    found = trainer.callback_metrics
    for layer in ("backbone", "momentum_backbone"):
        network = getattr(module, layer)
        bank, asked = (evaluation.encode(network, x, policy.eval_transform) for x, _ in (train, val))
        split = bank, train[1], asked, val[1]
        assert found[f"knn/{layer}/top1"].item() == near(evaluation.knn_top1(*split, num_classes=CLASSES, k=5))
        linear = found[f"linear_probe/{layer}/top1"].item()
        assert linear == pytest.approx(evaluation.linear_top1(*split), abs=1.5 / 24)  # one image: another solver
    assert not equal_states(module.backbone.state_dict(), module.momentum_backbone.state_dict())
    assert "linear_probe/train_top1" not in found  # its steps encode parts of images
    with pytest.raises(ValueError, match=r'`bank` must not be "train" for .*, whose steps encode parts of images'):
        run(bank="train")


def test_rows_of_other_images_are_refused():
    module = lc.MoCo("small_convnet", queue_size=32, batchnorm_splits=4, warmup_epochs=0)
    with pytest.raises(ValueError, match="`features` must name no momentum network"):
        quiet_fit(module, [OnlineKNN(CLASSES, features="momentum_projector", bank="train")])


def test_validation_features_that_the_bank_cannot_have_are_refused_at_the_start():
    class Other(Turning):
        def validation_step(self, batch, batch_idx):
            return {"features": self(batch[0]).flip(1)}

    with pytest.raises(ValueError, match=r"`features` must be the same in the validation step as in `forward`"):
        quiet_fit(Other(), [OnlineKNN(CLASSES)], max_epochs=1)


# Which labels, and which batches.


def test_the_first_loader_with_labels_is_the_one_that_a_run_monitors():
    images, labels = images_and_labels(24, seed=5)
    none = DataLoader(TensorDataset(images.float() / 255, labels * 0 - 1), batch_size=8)

    class Two(Turning):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    with pytest.warns(UserWarning, match="`knn`: no image of validation loader 0 has a label"):
        run = quiet_fit(Two(), [OnlineKNN(CLASSES, k=1)], clustered(), [none, clustered(24, seed=5)], max_epochs=1)
    assert run.callback_metrics.keys() == {"knn/top1", "knn/top1/dataloader_idx_1"}
    assert run.callback_metrics["knn/top1"] > 0.9


def test_more_classes_than_the_data_module_has_are_said():
    class Loaders(L.LightningDataModule):
        num_classes = CLASSES

        def train_dataloader(self):
            return labelled()

        def val_dataloader(self):
            return labelled(24)

    with pytest.warns(UserWarning, match="`knn`: `num_classes` is 9, and Loaders has 3 classes"):
        quiet_trainer([OnlineKNN(9)], max_epochs=1).fit(Turning(), datamodule=Loaders())


def test_the_training_loss_is_a_mean_over_labelled_images():
    images, labels = images_and_labels(48)
    some = torch.where(torch.arange(48) < 12, labels, -1)  # a batch and a half of six
    data = DataLoader(TensorDataset(images.float() / 255, some), batch_size=8)
    run = quiet_fit(Turning(), [OnlineLinearProbe(CLASSES, lr=1e-9)], data, max_epochs=1)
    assert run.callback_metrics["linear_probe/train_loss"].item() == near(torch.tensor(3.0).log().item(), NETWORK)


class Keyed(Turning):
    """Images under a key of their own, and a momentum network, which the probes call themselves."""

    def __init__(self):
        super().__init__()
        self.momentum_backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 16, bias=False)).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self(batch["pixel_values"]).square().mean() * 0

    def validation_step(self, batch, batch_idx):
        self(batch["pixel_values"])


def keyed(*more):
    images, labels = images_and_labels(48)
    rows = [
        {"pixel_values": image, "y": y} | dict.fromkeys(more, image)
        for image, y in zip(images.float() / 255, labels, strict=True)
    ]
    return DataLoader(rows, batch_size=8)


def test_images_of_other_keys_are_found_by_name_and_else_a_warning():
    def run(probes, epochs):
        two = [keyed("depth"), keyed("depth")]  # of two kinds of images neither is the only one
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metrics = quiet_fit(Keyed(), probes, *two, max_epochs=epochs).callback_metrics
        return metrics, [str(warning.message) for warning in caught if "`images=`" in str(warning.message)]

    place = {"labels": "y", "images": "pixel_values"}
    learns = OnlineLinearProbe(CLASSES, dataloader=keyed("depth"), **place)
    layers = ["backbone", "momentum_backbone"]
    metrics, said = run([OnlineKNN(CLASSES, k=1, features=layers, **place), learns], 1)
    assert said == []
    assert metrics["knn/top1"] == metrics["knn/momentum_backbone/top1"] == 1  # each image is in the bank
    assert metrics["linear_probe/top1"] > 0.9
    assert metrics["linear_probe/train_loss"] > 0
    metrics, said = run([OnlineKNN(CLASSES, labels="y")], 2)
    assert len(said) == 1
    assert metrics == {}


@pytest.mark.parametrize("source", ["missing", 7, lambda batch: batch["y"], None])
def test_images_that_are_not_there_are_an_error_of_their_own(source):
    with pytest.raises(UnreadableBatchError, match="images"):
        find_images({"pixel_values": torch.zeros(2), "y": 3}, source)


# Which votes.


def test_top_k_and_euclidean_votes_by_hand():
    knn = OnlineKNN(CLASSES, k=[5, 9], features="backbone", distance="euclidean", top_k=2)
    module = Turning()
    found = quiet_fit(module, [knn], labelled(), max_epochs=1).callback_metrics
    (images, classes), (queries, labels) = images_and_labels(48), images_and_labels(24, seed=5)
    with torch.no_grad():
        bank, asked = (module(x.float() / 255).double() for x in (images, queries))
    for k in (5, 9):
        right = torch.zeros(2)
        for row, label in zip(asked, labels.tolist(), strict=True):
            distances = (bank - row).norm(dim=1)
            votes = torch.zeros(CLASSES, dtype=torch.float64)
            for i in distances.argsort()[:k].tolist():
                votes[classes[i]] += 1 / (distances[i] + 1e-5)
            order = votes.argsort(descending=True).tolist()
            right += torch.tensor([order[0] == label, label in order[:2]])
        for number, share in zip((1, 2), (right / 24).tolist(), strict=True):
            assert found[f"knn/k{k}_t0.07/top{number}"].item() == near(share)
    assert found["knn/top1"] == found["knn/k5_t0.07/top1"]


def test_the_validation_loss_of_a_probe_is_the_mean_cross_entropy():
    probe, module = OnlineLinearProbe(CLASSES), Turning()
    run = quiet_fit(module, [probe], labelled(), max_epochs=1)
    images, labels = images_and_labels(24, seed=5)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(probe.predict(module(images.float() / 255)), labels)
    assert run.callback_metrics["linear_probe/loss"].item() == near(expected.item(), NETWORK)


class Offline(L.Callback):
    """Evaluates the features offline at the end of each validation."""

    def __init__(self, data, policy):
        self.data, self.policy, self.rows = data, policy, []

    def on_train_epoch_end(self, trainer, pl_module):
        x, queries = (evaluation.encode(pl_module, self.data.images(s), self.policy.eval_transform) for s in SPLITS)
        split = (x, self.data.labels("train"), queries, self.data.labels("val"))
        keys = ("knn/top1", "linear_probe/top1")
        offline = evaluation.knn_top1(*split, num_classes=9), evaluation.linear_top1(*split)
        self.rows.append([*(float(trainer.callback_metrics[key]) for key in keys), *offline])


SPLITS = ("train", "val")
NOISE = 0.01
"""Six of the 624 validation images."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: lc.SimCLR("small_convnet", warmup_epochs=0),
        lambda: lc.BYOL("small_convnet", warmup_epochs=0, hidden_dim=256, projection_dim=64, lr=0.05, momentum=0.99),
        lambda: lc.DINO(
            "small_convnet", warmup_epochs=0, hidden_dim=64, bottleneck_dim=32, num_prototypes=64, lr=1e-3, final_lr=0.0
        ),
    ],
    ids=["SimCLR", "BYOL", "DINO"],
)
def test_the_curves_of_a_run_are_those_of_offline_evaluations(make):
    data, policy = lc.data.EmojiDataModule(batch_size=128), lc.augment.byol_views(32)
    torch.manual_seed(0)
    offline = Offline(data, policy)
    callbacks = [lc.ViewAugmentation(policy, seed=0), OnlineKNN(9), OnlineLinearProbe(9), offline]
    quiet_trainer(callbacks, max_epochs=10, limit_train_batches=8).fit(make(), datamodule=data)
    knn, linear, offline_knn, offline_linear = torch.tensor(offline.rows).T
    assert len(knn) == 10
    torch.testing.assert_close(knn, offline_knn, **f32(ROUNDED))
    assert (linear - offline_linear).abs().max() < 0.03
    apart = (offline_linear.view(-1, 1) - offline_linear) > NOISE
    assert apart.any()
    assert ((linear.view(-1, 1) - linear)[apart] > 0).all()
