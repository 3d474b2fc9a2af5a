"""The online k-NN: its bank, its vote, its ranks."""

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_contrast.callbacks import OnlineKNN
from tests.callbacks.probe_modules import CLASSES, classifier, images_and_labels, labelled, quiet_fit, quiet_trainer
from tests.callbacks.strategies import fit_ranks
from tests.launch import run_processes
from tests.tolerances import near


class Frozen(classifier()):
    """Its features are the same at every moment of a run, so that a bank is known without one."""

    def training_step(self, batch, batch_idx):
        return {"loss": self(batch[0]).sum() * 0, "features": colours(batch[0])}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return {"features": colours(batch[0])}

    test_step = validation_step


class Forward(Frozen):
    """Its forward gives the features, as that of the methods does."""

    def forward(self, images):
        return colours(images)

    def training_step(self, batch, batch_idx):
        images = batch if isinstance(batch, torch.Tensor) else batch[0]
        return {"loss": sum(p.sum() for p in self.parameters()) * 0, "features": self(images)}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(labelled(16).dataset)


def colours(images):
    return images.flatten(1)[:, :6] - 0.5  # of few pixels, so that many neighbours are wrong


def top1_by_hand(bank, bank_labels, queries, labels, k, temperature):
    right = 0
    for query, label in zip(queries.double(), labels.tolist(), strict=True):
        cosines = [float(query @ row / (query.norm() * row.norm())) for row in bank.double()]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
        votes = dict.fromkeys(range(CLASSES), 0.0)
        for i in nearest:
            votes[int(bank_labels[i])] += torch.tensor(cosines[i] / temperature).exp().item()
        right += max(votes, key=votes.get) == label
    return right / len(labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.07), (40, 0.5)])
def test_it_logs_the_published_vote_over_the_features_of_the_last_epoch(k, temperature):
    run = quiet_fit(Frozen(), [OnlineKNN(CLASSES, bank="train", k=k, temperature=temperature)], labelled())
    bank, bank_labels = images_and_labels(48)
    queries, labels = images_and_labels(24, seed=5)
    expected = top1_by_hand(
        colours(bank.float() / 255), bank_labels, colours(queries.float() / 255), labels, k, temperature
    )
    assert run.callback_metrics["knn/top1"].item() == near(expected)
    assert 0.4 < expected < 1


class Keeps(OnlineKNN):
    """Notes the bank of each validation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.banks = []

    def predict(self, features, layer=""):
        self.banks.append(self._votes.get("backbone"))
        return super().predict(features, layer)


def test_the_bank_holds_one_epoch_and_no_more_than_its_size():
    images, labels = images_and_labels(48)
    probe = Keeps(CLASSES, bank="train")
    quiet_fit(Frozen(), [probe], labelled(), max_epochs=3)
    assert [len(bank[1]) for bank in probe.banks[::3]] == [48, 48, 48]
    assert torch.equal(probe.banks[0][1], labels)
    small = Keeps(CLASSES, bank="train", max_bank=20)
    quiet_fit(Frozen(), [small], labelled())
    features, kept = small.banks[0]
    assert torch.equal(kept, labels[-16:])  # whole batches of 8, the newest
    expected = torch.nn.functional.normalize(colours(images[-16:].float() / 255), dim=1)
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=0)  # half precision


def test_in_the_middle_of_an_epoch_the_rest_is_an_epoch_old():
    probe = Keeps(CLASSES, bank="train")
    quiet_fit(Frozen(), [probe], labelled(), val_check_interval=2, num_sanity_val_steps=0)
    assert [len(bank[1]) for bank in probe.banks[::3]] == [16, 32, 48, 48, 48, 48]


def test_memory_is_half_precision_while_training_and_given_back_after_validation():
    probe = OnlineKNN(CLASSES, bank="train")
    quiet_fit(Frozen(), [probe], labelled(), max_epochs=1)
    buffer = probe._buffers["backbone"]
    assert {features.dtype for features, _ in buffer.batches} == {torch.float16}
    assert not probe._votes
    assert buffer.rows == 48


def test_images_without_label_and_broken_features_do_not_vote():
    images, labels = images_and_labels(48)
    some = torch.where(torch.arange(48) % 2 == 0, labels, -1)

    class Sick(Frozen):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            output["features"][0] = float("inf")
            return output

    data = DataLoader(list(zip(images.float() / 255, some, strict=True)), batch_size=8)
    probe = Keeps(CLASSES, bank="train")
    with pytest.warns(UserWarning, match="Keeps: the features 'backbone' of 1 of 8 images are NaN or infinite"):
        quiet_fit(Sick(), [probe], data, max_epochs=1)
    features, kept = probe.banks[0]
    assert torch.equal(kept, labels[(torch.arange(48) % 2 == 0) & (torch.arange(48) % 8 != 0)])
    assert features.isfinite().all()


def test_fewer_features_than_neighbours_vote_all():
    run = quiet_fit(Frozen(), [OnlineKNN(CLASSES, bank="train", k=200)], labelled(16), max_epochs=1)
    assert "knn/top1" in run.callback_metrics


def test_test_and_a_second_fit():
    probe, module = Keeps(CLASSES, bank="train"), Frozen()
    trainer = quiet_fit(module, [probe], labelled(), max_epochs=1)
    trainer.test(module, labelled(24, seed=5), verbose=False)
    assert trainer.callback_metrics.keys() == {"knn/test_top1"}
    trainer.fit_loop.max_epochs = 2
    probe.banks.clear()
    quiet_fit(module, [], labelled(24), trainer=trainer)
    assert [len(bank[1]) for bank in probe.banks[::3]] == [24]


class Loaders(L.LightningDataModule):
    def train_dataloader(self):
        return labelled()

    def val_dataloader(self):
        return labelled(24, seed=5)


@pytest.mark.dist
def test_two_ranks_share_one_bank():
    def on_rank(rank):
        probe = Keeps(CLASSES, bank="train", k=7)
        run = fit_ranks(Frozen(), [probe], Loaders(), "ddp", max_epochs=1)
        return run.callback_metrics["knn/top1"].item(), probe.banks[0][1].bincount().tolist()

    one = Keeps(CLASSES, bank="train", k=7)
    whole = quiet_fit(Frozen(), [one], labelled(), max_epochs=1).callback_metrics["knn/top1"].item()
    for top1, counts in run_processes(on_rank, 2, init=False):
        assert top1 == pytest.approx(whole)
        assert counts == one.banks[0][1].bincount().tolist()


def test_several_neighbourhoods_and_temperatures_at_once():
    run = quiet_fit(
        Frozen(), [OnlineKNN(CLASSES, bank="train", k=[1, 7, 40], temperature=[0.07, 0.5])], labelled(), max_epochs=1
    )
    bank, bank_labels = images_and_labels(48)
    queries, labels = images_and_labels(24, seed=5)
    bank, queries = colours(bank.float() / 255), colours(queries.float() / 255)
    values = set()
    for k in (1, 7, 40):
        for temperature in (0.07, 0.5):
            expected = top1_by_hand(bank, bank_labels, queries, labels, k, temperature)
            assert run.callback_metrics[f"knn/k{k}_t{temperature}/top1"].item() == near(expected)
            values.add(expected)
    assert len(values) > 2
    assert run.callback_metrics["knn/top1"] == run.callback_metrics["knn/k1_t0.07/top1"]


def encoded_by_hand(module, images):
    module.eval()
    with torch.no_grad():
        return module.backbone(images.float() / 255)


@pytest.mark.parametrize("kind", ["fresh", "loader", "list"])
def test_a_bank_is_encoded_at_each_validation(kind):
    module = classifier()()
    other = labelled(40, seed=8, shuffle=True)
    bank = {"fresh": {"bank": "fresh"}, "loader": {"dataloader": other}, "list": {"dataloader": list(other)}}[kind]
    probe = Keeps(CLASSES, k=7, **bank)
    run = quiet_fit(module, [probe], labelled(shuffle=True, drop_last=True), max_epochs=2)
    images, bank_labels = images_and_labels(48) if kind == "fresh" else images_and_labels(40, seed=8)
    features = encoded_by_hand(module, images)
    queries, labels = images_and_labels(24, seed=5)
    expected = top1_by_hand(features, bank_labels, encoded_by_hand(module, queries), labels, 7, 0.07)
    assert run.callback_metrics["knn/top1"].item() == near(expected)
    kept, kept_labels = probe.banks[-1]
    assert kept_labels.bincount().tolist() == bank_labels.bincount().tolist()
    if kind != "list":  # a set is read in order, whatever its loader does
        torch.testing.assert_close(kept, torch.nn.functional.normalize(features, dim=1), atol=1e-3, rtol=0)
    assert not torch.equal(probe.banks[0][0], kept)  # the module has learned in between


@pytest.mark.parametrize("size", [20, 47])
def test_a_small_bank_is_a_fixed_draw_from_the_set(size):
    probe = Keeps(CLASSES, max_bank=size)
    quiet_fit(Forward(), [probe], labelled(), max_epochs=2)
    images, _ = images_and_labels(48)
    rows = torch.nn.functional.normalize(colours(images.float() / 255), dim=1)
    first, last = probe.banks[0][0], probe.banks[-1][0]
    assert torch.equal(first, last)
    taken = torch.cdist(first, rows).argmin(1).tolist()
    assert taken == sorted(set(taken))
    assert len(taken) == size < 48
    assert taken != list(range(size))
    listed = Keeps(CLASSES, dataloader=list(labelled()), max_bank=size)
    quiet_fit(Forward(), [listed], labelled(), max_epochs=1)
    assert torch.equal(listed.banks[0][0], rows[:size])


def test_each_layer_and_each_loader_has_its_own_value():
    probe = OnlineKNN(CLASSES, features=["backbone", "backbone.0"], bank="fresh")
    run = quiet_fit(classifier()(), [probe], val=[labelled(24, seed=5), labelled(16, seed=6)])
    keys = {f"knn/{layer}top1{index}" for layer in ("", "backbone/", "backbone.0/")
            for index in ("", "/dataloader_idx_0", "/dataloader_idx_1")}  # fmt: skip
    assert run.callback_metrics.keys() == keys
    assert run.callback_metrics["knn/top1"] == run.callback_metrics["knn/backbone/top1/dataloader_idx_0"]


def test_an_unlabelled_run_with_a_labelled_bank():
    images, _ = images_and_labels(48)
    train = DataLoader(images.float() / 255, batch_size=8)

    run = quiet_fit(Forward(), [OnlineKNN(CLASSES, dataloader=labelled(40, seed=8))], train, max_epochs=1)
    assert run.callback_metrics["knn/top1"] > 0.4


def test_a_bank_without_a_label_is_a_warning_and_an_empty_one_an_error():
    images, labels = images_and_labels(16)
    none = DataLoader(list(zip(images.float() / 255, labels * 0 - 1, strict=True)), batch_size=8)
    with pytest.warns(UserWarning, match="`knn`: no image of the bank has a label and finite features"):
        run = quiet_fit(Forward(), [OnlineKNN(CLASSES, dataloader=none)], max_epochs=1)
    assert run.callback_metrics == {}
    with pytest.raises(ValueError, match="`dataloader` must yield at least one batch, got 'list'"):
        quiet_fit(Forward(), [OnlineKNN(CLASSES, dataloader=[])], max_epochs=1)


def test_a_stream_that_cannot_be_encoded_is_said_at_the_start():
    seen = []

    class Start(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([str(warning.message) for warning in caught if "`knn`" in str(warning.message)])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = DataLoader(Stream(), batch_size=8)
        run = quiet_trainer([OnlineKNN(CLASSES), Start()], max_epochs=1)
        run.fit(Forward(), stream, labelled(24, seed=5))
        seen.append([str(warning.message) for warning in caught if "`knn`" in str(warning.message)])
    assert len(seen[0]) == len(seen[-1]) == 1
    assert seen[0][0].startswith("`knn`: the training loader, a DataLoader, has no dataset of known length")
    assert "knn/top1" not in run.callback_metrics


def test_a_bank_of_other_features_is_named():
    class Other(Frozen):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return {"features": colours(batch[0])[:, :5]}

    with pytest.raises(ValueError, match=r"`features` must be as wide at validation as in the bank, got \(5, 6\)"):
        quiet_fit(Other(), [OnlineKNN(CLASSES, bank="fresh")], max_epochs=1)


def test_without_a_training_set_a_warning_says_so_and_a_data_module_gives_one():
    trainer = quiet_trainer([OnlineKNN(CLASSES)])
    with pytest.warns(UserWarning, match="`knn`: there is no training set to encode for a bank. Pass the `datamodule`"):
        trainer.validate(Forward(), labelled(24), verbose=False)
    assert trainer.callback_metrics == {}
    trainer, module = quiet_trainer([OnlineKNN(CLASSES)]), Forward()
    trainer.validate(module, datamodule=Loaders(), verbose=False)
    fitted = quiet_fit(module, [OnlineKNN(CLASSES)], labelled(), max_epochs=1)
    assert trainer.callback_metrics["knn/top1"] == fitted.callback_metrics["knn/top1"] > 0.4


@pytest.mark.dist
@pytest.mark.parametrize("size", [48, 47])
def test_two_ranks_divide_a_fresh_bank(size):
    def on_rank(rank):
        probe = Keeps(CLASSES, k=7, bank="fresh", max_bank=size)
        run = fit_ranks(Forward(), [probe], Loaders(), "ddp", max_epochs=1)
        return run.callback_metrics["knn/top1"].item(), probe.banks[0][1].bincount().tolist()

    one = Keeps(CLASSES, k=7, bank="fresh", max_bank=size)
    whole = quiet_fit(Forward(), [one], labelled(), max_epochs=1).callback_metrics["knn/top1"].item()
    for top1, counts in run_processes(on_rank, 2, init=False):
        assert top1 == pytest.approx(whole)
        assert counts == one.banks[0][1].bincount().tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": []}, "`k` must not be empty"),
        ({"k": [5, 0]}, "`k` must be >= 1"),
        ({"k": [5, 30], "max_bank": 20}, "`max_bank` must be >= 30"),
        ({"bank": "val"}, "`bank` must be one of 'train', 'fresh', got 'val'"),
        ({"bank": "train", "dataloader": [1]}, "`bank` must be left out if there is a `dataloader`, got 'train'"),
        ({"k": 0}, "`k` must be >= 1"),
        ({"temperature": 0.0}, "`temperature` must be > 0"),
        ({"max_bank": 3}, "`max_bank` must be >= 20, got 3. Raise `max_bank` to at least `k`"),
        ({"num_classes": 0}, "`num_classes` must be >= 2"),
    ],
)
def test_arguments_are_checked_when_they_are_given(arguments, message):
    with pytest.raises(ValueError, match=message):
        OnlineKNN(**({"num_classes": 3} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bank": [1]}, '`bank` must be "train" or "fresh", got \'list\'. Give a loader as `dataloader`'),
        ({"dataloader": 3}, "`dataloader` must be a DataModule or a loader, got 'int'"),
    ],
)
def test_types_are_checked(arguments, message):
    with pytest.raises(TypeError, match=message):
        OnlineKNN(CLASSES, **arguments)
