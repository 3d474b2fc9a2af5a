"""What the online linear probe learns, logs, keeps and refuses."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_contrast.callbacks import OnlineKNN, OnlineLinearProbe
from lightning_contrast.callbacks.probes.bank import Step
from lightning_contrast.callbacks.probes.linear_head import CLIP, STATISTICS_MOMENTUM, LinearHead, default_lr
from tests.callbacks.probe_modules import (
    CLASSES,
    classifier,
    equal_states,
    images_and_labels,
    labelled,
    quiet_fit,
    quiet_trainer,
)
from tests.launch import run_processes
from tests.tolerances import FORMULA, NETWORK, TRAINING, f32, near


class Records(OnlineLinearProbe):
    """A probe that keeps what it was given and what it logged of each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps = []

    def learn(self, step):
        self.steps.append(step)
        super().learn(step)


def plain_regression(batches, lr, momentum, classes):
    """Softmax regression with momentum on features standardized by the statistics of earlier batches, in float64."""
    width = batches[0][0].shape[1]
    weight, bias = torch.zeros(classes, width, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    speed_weight, speed_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    mean = batches[0][0].double().mean(0)
    var = batches[0][0].double().var(0, unbiased=False)
    losses = []
    for number, (features, labels) in enumerate(batches, start=1):
        features = features.double()
        x = ((features - mean) / var.sqrt()).clamp(-CLIP, CLIP)
        grad_weight, grad_bias, loss = torch.zeros_like(weight), torch.zeros_like(bias), 0.0
        for row, label in zip(x, labels.tolist(), strict=True):
            p = torch.softmax(weight @ row + bias, dim=0)
            loss -= p[label].log().item() / len(x)
            error = p.clone()
            error[label] -= 1
            grad_weight += error.outer(row) / len(x)
            grad_bias += error / len(x)
        losses.append(loss)
        speed_weight, speed_bias = momentum * speed_weight + grad_weight, momentum * speed_bias + grad_bias
        weight, bias = weight - lr * speed_weight, bias - lr * speed_bias
        share = max(1 / number, STATISTICS_MOMENTUM)
        shift = features.mean(0) - mean
        var = (1 - share) * var + share * features.var(0, unbiased=False) + share * (1 - share) * shift**2
        mean = mean + share * shift
    return weight, bias, mean, var, losses


def random_batches(count=12, rows=10, width=5):
    generator = torch.Generator().manual_seed(2)
    scale, offset = torch.tensor([1.0, 30.0, 0.01, 1.0, 2.0]), torch.tensor([0.0, -200.0, 5.0, 1.0, 0.0])
    features = torch.randn(count, rows, width, generator=generator) * scale + offset
    return list(zip(features, torch.randint(0, CLASSES, (count, rows), generator=generator), strict=True))


def trained_head(batches, lr=0.1, momentum=0.9):
    head = LinearHead(batches[0][0].shape[1], CLASSES, torch.device("cpu"))
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=momentum)
    losses = []
    for features, labels in batches:
        everywhere = torch.ones(len(labels), dtype=torch.bool)
        losses.append(head.gradient(features, labels, everywhere, everywhere)[1].item())
        optimizer.step()
    return head, losses


def test_the_head_equals_softmax_regression_in_plain_loops():
    batches = random_batches()
    head, losses = trained_head(batches)
    weight, bias, mean, var, expected = plain_regression(batches, 0.1, 0.9, CLASSES)
    torch.testing.assert_close(head.weight.detach().double(), weight, **f32(TRAINING, size=0.1))
    torch.testing.assert_close(head.bias.detach().double(), bias, **f32(TRAINING, size=0.1))
    torch.testing.assert_close(head.mean.double(), mean, **f32(FORMULA))
    torch.testing.assert_close(head.var.double(), var, **f32(TRAINING, size=0.001))
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[0] == near(torch.tensor(float(CLASSES)).log().item())


@pytest.mark.dist
def test_two_ranks_train_the_head_of_one_process_on_the_joined_batch():
    batches = random_batches(rows=10)

    def on_rank(rank):
        rows = slice(0, 4) if rank == 0 else slice(4, 10)  # unequal on purpose
        head, losses = trained_head([(features[rows], labels[rows]) for features, labels in batches])
        return {name: value.detach() for name, value in head.state_dict().items()}, losses

    whole, losses = trained_head(batches)
    for state, rank_losses in run_processes(on_rank, 2):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, **f32(NETWORK, size=0.1))
        assert rank_losses == near(losses, NETWORK)


def test_images_that_do_not_count_change_nothing():
    features, labels = random_batches(count=1)[0]
    head, other = (LinearHead(5, CLASSES, torch.device("cpu")) for _ in range(2))
    valid = torch.arange(10) < 6
    head.gradient(features, labels, valid, valid)
    other.gradient(features[:6], labels[:6], valid[:6], valid[:6])
    torch.testing.assert_close(head.weight.grad, other.weight.grad)
    torch.testing.assert_close(head.mean, other.mean)
    torch.testing.assert_close(head.var, other.var)


def test_statistics_follow_features_without_labels():
    features, labels = random_batches(count=1)[0]
    head = LinearHead(5, CLASSES, torch.device("cpu"))
    none, every = torch.zeros(10, dtype=torch.bool), torch.ones(10, dtype=torch.bool)
    _, loss = head.gradient(features, labels, none, every)
    torch.testing.assert_close(head.mean, features.mean(0))
    assert not head.weight.grad.any()
    assert loss == 0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_scale_of_the_features_does_not_matter(scale):
    batches = [(features * scale + 3 * scale, labels) for features, labels in random_batches()]
    _, losses = trained_head(batches)
    _, reference = trained_head(random_batches())
    assert losses == pytest.approx(reference, rel=0.05)


def test_a_constant_feature_gets_no_weight():
    batches = [(torch.cat([f, torch.full((10, 1), 7.3)], dim=1), labels) for f, labels in random_batches()]
    head, losses = trained_head(batches)
    assert head.weight[:, -1].abs().max() < 1e-3
    assert all(torch.isfinite(torch.tensor(losses)))


class Colours(classifier()):
    """Gives features that separate the classes and never change."""

    def training_step(self, batch, batch_idx):
        return {"loss": self(batch[0]).square().mean(), "features": batch[0].mean((2, 3))}

    def validation_step(self, batch, batch_idx):
        return {"features": batch[0].mean((2, 3))}


def test_it_reaches_the_accuracy_that_the_features_allow():
    run = quiet_fit(Colours(), [OnlineLinearProbe(CLASSES, bank="train")], max_epochs=5)
    assert run.callback_metrics["linear_probe/top1"] > 0.95
    assert run.callback_metrics["linear_probe/train_top1"] > 0.95
    assert run.callback_metrics["linear_probe/train_loss"] < 0.3


@pytest.mark.parametrize(("batch", "width", "lr"), [(64, 512, 8 / 512), (4096, 512, 16 / 512), (256, 6, 0.1)])
def test_the_learning_rate_goes_with_the_batch_and_the_width(batch, width, lr):
    assert default_lr(batch, width) == pytest.approx(lr)
    probe = OnlineLinearProbe(CLASSES)
    everywhere = torch.ones(batch, dtype=torch.bool)
    probe.learn(Step(torch.randn(batch, width), torch.zeros(batch, dtype=torch.int64), everywhere, everywhere))
    assert probe.optimizer.param_groups[0]["lr"] == pytest.approx(lr)
    assert OnlineLinearProbe(CLASSES, lr=2.5).lr == 2.5


def ill_conditioned(width, batch=32, steps=150):
    """Correlated features of very different scales, three directions of which tell the class."""
    g = torch.Generator().manual_seed(4)
    mixing = torch.randn(24, width, generator=g) * torch.logspace(0, -1.5, 24).unsqueeze(1)
    offset, scale = 20 * torch.randn(width, generator=g), torch.logspace(-3, 2, width)
    for _ in range(steps):
        labels = torch.randint(0, CLASSES, (batch,), generator=g)
        source = torch.randn(batch, 24, generator=g)
        source[torch.arange(batch), 3 + labels] += 4
        yield (source @ mixing + offset) * scale, labels


@pytest.mark.parametrize("width", [48, 768])
def test_no_learning_rate_needs_tuning(width):
    probe, right = OnlineLinearProbe(CLASSES), []
    for features, labels in ill_conditioned(width):
        everywhere = torch.ones(len(labels), dtype=torch.bool)
        if probe.head is not None:
            right.append((probe.predict(features).argmax(1) == labels).float().mean().item())
        probe.learn(Step(features, labels, everywhere, everywhere))
    assert sum(right[-30:]) / 30 > 0.9  # the best classifier of the sources is right in 99 %


def test_logged_values_are_those_of_the_steps():
    probe = Records(CLASSES, bank="train")
    module = classifier()()
    run = quiet_fit(module, [probe], max_epochs=1)
    batches = [(step.features, step.labels) for step in probe.steps]
    *_, losses = plain_regression(batches, probe.optimizer.param_groups[0]["lr"], 0.9, CLASSES)
    assert run.callback_metrics["linear_probe/train_loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    images, labels = images_and_labels(24, seed=5)
    module.eval()
    predicted = probe.head(module.backbone(images.float() / 255)).argmax(1)
    accuracy = (predicted == labels).float().mean().item()
    assert run.callback_metrics["linear_probe/top1"].item() == near(accuracy)


def test_checkpoints_and_early_stopping_can_watch_it(tmp_path):
    watch = ModelCheckpoint(tmp_path, monitor="linear_probe/top1", mode="max")
    stop = EarlyStopping("linear_probe/top1", mode="max", patience=1, strict=True)
    run = quiet_fit(classifier()(), [OnlineLinearProbe(CLASSES), watch, stop], enable_checkpointing=True, max_epochs=8)
    assert watch.best_model_score == stop.best_score
    assert run.current_epoch < 8


@pytest.mark.parametrize("optimizer_steps", ["epoch 1", "epoch 2"])
@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, optimizer_steps):
    stop = int(optimizer_steps[-1])

    def run(epochs, ckpt_path=None):
        probe, module = OnlineLinearProbe(CLASSES), classifier()()
        module.drop.p = 0.0  # which draws from a generator that no checkpoint holds
        trainer = quiet_fit(module, [probe], labelled(), max_epochs=epochs, ckpt_path=ckpt_path)
        return probe, module, trainer

    whole, module, trainer = run(3)
    _, _, first = run(stop)
    first.save_checkpoint(tmp_path / "stop.ckpt")
    resumed, module_resumed, trainer_resumed = run(3, tmp_path / "stop.ckpt")
    assert equal_states(module.state_dict(), module_resumed.state_dict())
    assert equal_states(whole.head.state_dict(), resumed.head.state_dict())
    assert whole.head.batches == resumed.head.batches == 18
    for a, b in zip(*(p.optimizer.state_dict()["state"].values() for p in (whole, resumed)), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert trainer.callback_metrics == trainer_resumed.callback_metrics


def test_a_checkpoint_of_another_width_is_refused():
    probe = OnlineLinearProbe(CLASSES)
    quiet_fit(classifier()(), [probe], max_epochs=1)
    other = OnlineLinearProbe(CLASSES, features="out")
    other.load_state_dict(probe.state_dict())
    with pytest.raises(ValueError, match=r"classifier of shape \(3, 6\).*got \(3, 3\)"):
        quiet_fit(classifier()(), [other], max_epochs=1)


def test_state_is_kept_when_it_was_loaded_and_never_used():
    probe, other = OnlineLinearProbe(CLASSES), OnlineLinearProbe(CLASSES)
    assert probe.state_dict() == {}
    quiet_fit(classifier()(), [probe], max_epochs=1)
    other.load_state_dict(probe.state_dict())
    assert equal_states(other.state_dict()["head"], probe.state_dict()["head"])


def test_a_second_fit_goes_on_and_validation_between_two_fits_uses_what_was_learned():
    probe, module = OnlineLinearProbe(CLASSES, bank="train"), classifier()()
    trainer = quiet_fit(module, [probe], max_epochs=2)
    logged = trainer.callback_metrics["linear_probe/top1"]
    trainer.validate(module, labelled(24, seed=5), verbose=False)
    assert trainer.callback_metrics["linear_probe/top1"] == logged
    weight = probe.head.weight.detach().clone()
    trainer.fit_loop.max_epochs = 4
    quiet_fit(module, [probe], trainer=trainer)
    assert probe.head.batches == 24
    assert not torch.equal(probe.head.weight, weight)
    trainer.test(module, labelled(24, seed=5), verbose=False)
    assert trainer.callback_metrics.keys() == {
        f"linear_probe/test_{key}" for key in ("top1", "calibration_error", "loss")
    }


def test_a_probe_that_has_learned_nothing_logs_nothing_and_says_why():
    trainer = quiet_trainer([OnlineLinearProbe(CLASSES), OnlineKNN(CLASSES)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(classifier()(), labelled(24), verbose=False)
    said = [str(warning.message) for warning in caught if "there is no training set to encode" in str(warning.message)]
    assert [text.split(":")[0] for text in said] == ["`linear_probe`", "`knn`"]
    assert trainer.callback_metrics == {}


def test_a_classifier_restored_for_validation_can_still_learn(tmp_path):
    probe, module = OnlineLinearProbe(CLASSES, bank="train"), classifier()()
    quiet_fit(module, [probe], max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    restored = OnlineLinearProbe(CLASSES, bank="train")
    trainer = quiet_trainer([restored])
    trainer.validate(module, labelled(24), ckpt_path=tmp_path / "a.ckpt", verbose=False)  # in inference mode
    assert equal_states(restored.head.state_dict(), probe.head.state_dict())
    quiet_fit(module, [restored], trainer=trainer)
    assert restored.head.batches == 18


def test_several_validation_loaders_are_logged_each_and_the_first_one_counts():
    images, labels = images_and_labels(24, seed=5)
    wrong = DataLoader(list(zip(images.float() / 255, (labels + 1) % CLASSES, strict=True)), batch_size=8)
    run = quiet_fit(classifier()(), [OnlineLinearProbe(CLASSES)], val=[labelled(24, seed=5), wrong], max_epochs=6)
    first, second = (run.callback_metrics[f"linear_probe/top1/dataloader_idx_{i}"] for i in range(2))
    assert run.callback_metrics["linear_probe/top1"] == first
    assert first > 0.8 > 0.2 > second


@pytest.mark.parametrize(
    ("collate", "labels"),
    [
        (lambda x, y: (x, y), None),
        (lambda x, y: {"image": x, "label": y}, None),
        (lambda x, y: {"image": x, "kind": y}, "kind"),
        (lambda x, y: [x, torch.zeros(len(y)), y], 2),
        (lambda x, y: (x, y), -1),
        (lambda x, y: {"image": x, "deep": {"y": y}}, lambda batch: batch["deep"]["y"]),
    ],
    ids=["contract tuple", "contract dict", "key", "index", "last", "callable"],
)
def test_labels_are_found_where_they_are(collate, labels):
    class Images(classifier()):
        def split(self, batch):
            return batch["image"] if isinstance(batch, dict) else batch[0]

        def training_step(self, batch, batch_idx):
            return self(self.split(batch)).square().mean()

        def validation_step(self, batch, batch_idx):
            self(self.split(batch))

    images, y = images_and_labels(16)
    pairs = list(zip(images.float() / 255, y, strict=True))

    def together(rows):
        return collate(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    loader = DataLoader(pairs, batch_size=8, collate_fn=together)
    probe = Records(CLASSES, labels=labels)
    quiet_fit(Images(), [probe], loader, loader, max_epochs=1)
    assert torch.equal(torch.cat([step.labels for step in probe.steps]), y)


def test_images_labelled_minus_one_are_left_out():
    images, labels = images_and_labels(48)
    some = torch.where(torch.arange(48) % 3 == 0, labels, -1)
    data = DataLoader(list(zip(images.float() / 255, some, strict=True)), batch_size=8)
    probe = Records(CLASSES, bank="train")
    run = quiet_fit(Colours(), [probe], data, data, max_epochs=8)
    assert sum(int(step.valid.sum()) for step in probe.steps) == 8 * 16
    assert run.callback_metrics["linear_probe/top1"] > 0.8


def test_features_that_are_not_finite_are_named_and_left_out():
    class Sick(classifier()):
        def training_step(self, batch, batch_idx):
            features = self.backbone(batch[0]).detach()
            features[1] = float("nan")
            return {"loss": self(batch[0]).square().mean(), "features": features}

    probe = Records(CLASSES)
    with pytest.warns(UserWarning, match=r"Records: the features 'backbone' of 1 of 8 images are NaN"):
        run = quiet_fit(Sick(), [probe], max_epochs=1)
    assert all(int(step.valid.sum()) == 7 for step in probe.steps)
    assert run.callback_metrics["linear_probe/train_loss"].isfinite()
    assert all(value.isfinite().all() for value in probe.head.state_dict().values())


def bad_labels(value, dtype=torch.int64):
    images, labels = images_and_labels(16)
    labels = labels.to(dtype)
    labels[3] = value
    return DataLoader(list(zip(images.float() / 255, labels, strict=True)), batch_size=8)


@pytest.mark.parametrize(
    ("probe", "data", "error", "message"),
    [
        ({}, lambda: bad_labels(CLASSES), ValueError, r"`labels` must lie in 0\.\.2, .*got 3\. Set `num_classes`"),
        ({}, lambda: bad_labels(-2), ValueError, r"`labels` must lie in 0\.\.2, or be -1 .*got -2"),
        ({}, lambda: bad_labels(0.5, torch.float32), TypeError, r"tensor of integer classes, got 'torch.float32'"),
        ({"labels": 4}, labelled, ValueError, r"index into a batch of 2 items, got 4.*`labels=`"),
        ({"labels": "y"}, labelled, ValueError, r"name a key of the batch \('y' is none\), got 'list'"),
        ({"labels": lambda batch: None}, labelled, TypeError, r"tensor of integer classes, got 'NoneType'"),
        ({"labels": lambda batch: batch[1].view(-1, 1)}, labelled, ValueError, r"shape \(B,\), got \(8, 1\)"),
        ({"labels": lambda batch: batch[1][:3]}, labelled, ValueError, r"features of 3 images, .*shape \(8, 6\)"),
        (
            {"features": "bakbone"},
            labelled,
            ValueError,
            r"submodule of Classifier, got 'bakbone'.*Near names: 'backbone'",
        ),
        ({"features": "nothing"}, labelled, ValueError, r"It has 'backbone', 'drop', 'out' and their submodules"),
    ],
)
def test_bad_input_is_named(probe, data, error, message):
    with pytest.raises(error, match=message):
        quiet_fit(classifier()(), [OnlineLinearProbe(CLASSES, **probe)], data(), max_epochs=1, num_sanity_val_steps=0)


def test_images_without_labels_are_an_error_that_says_how_to_give_them():
    class Bare(classifier()):
        def training_step(self, batch, batch_idx):
            return self(batch).mean()

    images, _ = images_and_labels(16)
    data = DataLoader(images.float() / 255, batch_size=8)
    with pytest.raises(ValueError, match=r"`labels` must be in the batch, .*OnlineLinearProbe needs labels"):
        quiet_fit(Bare(), [OnlineLinearProbe(CLASSES)], data, num_sanity_val_steps=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "`num_classes` must be >= 2"),
        ({"num_classes": 2.5}, TypeError, "`num_classes` must be a whole number"),
        ({"lr": 0.0}, ValueError, "`lr` must be > 0"),
        ({"name": ""}, ValueError, "`name` must be a word"),
        ({"features": ""}, ValueError, "`features` must be the name of a submodule"),
        ({"features": 3}, TypeError, "`features` must be the name of a submodule"),
        ({"labels": 1.5}, TypeError, "`labels` must be None, a str, an int or a callable"),
        ({"tokens": "max"}, ValueError, "`tokens` must be one of 'mean', 'cls'"),
    ],
)
def test_arguments_are_checked_when_they_are_given(arguments, error, message):
    with pytest.raises(error, match=message):
        OnlineLinearProbe(**({"num_classes": 3} | arguments))


def test_two_probes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="`name` must differ between the probes of a Trainer, got 'probe'"):
        quiet_fit(classifier()(), [OnlineLinearProbe(CLASSES, name="probe"), OnlineKNN(CLASSES, name="probe")])
    with pytest.raises((ValueError, RuntimeError), match=r"state_key.*unique"):
        quiet_trainer([OnlineLinearProbe(CLASSES), OnlineLinearProbe(CLASSES)])  # Lightning's own message


def test_an_exception_takes_the_hooks_away():
    class Breaks(classifier()):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            raise KeyError("stop")

    module = Breaks()
    with pytest.raises(KeyError):
        quiet_fit(module, [OnlineLinearProbe(CLASSES)])
    assert all(not each._forward_hooks for each in module.modules())


def test_an_empty_validation_loader_is_no_matter():
    run = quiet_fit(classifier()(), [OnlineLinearProbe(CLASSES)], limit_val_batches=0)
    assert run.callback_metrics.keys() == {"linear_probe/train_top1", "linear_probe/train_loss"}


def test_it_is_a_lightning_callback_with_a_state_key_of_its_own():
    assert isinstance(OnlineLinearProbe(3), L.Callback)
    assert OnlineLinearProbe(3, name="a").state_key == "OnlineLinearProbe[a]"
