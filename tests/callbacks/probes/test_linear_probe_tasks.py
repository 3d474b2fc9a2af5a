"""What the online linear probe can learn besides classes that count alike: several labels, numbers, rare classes."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_contrast.callbacks import OnlineLinearProbe
from lightning_contrast.callbacks.probes.linear_head import LinearHead
from lightning_contrast.callbacks.probes.metrics import ClassScores, MultilabelScores, RegressionScores
from lightning_contrast.callbacks.probes.tasks import build_task
from tests.callbacks.probe_modules import CLASSES, classifier, equal_states, images_and_labels, labelled, quiet_fit
from tests.callbacks.probes.test_linear_probe_data import Plain
from tests.launch import run_processes
from tests.tolerances import NETWORK, TRAINING, f32, near

CPU = torch.device("cpu")


def step(head, features, targets, valid=None):
    valid = torch.ones(len(features), dtype=torch.bool) if valid is None else valid
    return head.gradient(features, targets, valid, torch.ones(len(features), dtype=torch.bool))


def standardised(features):
    return (features - features.mean(0)) / features.std(0, unbiased=False)


def random_rows(rows=12, width=4, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def head_of(task, outputs, weights=None, seed=1):
    head = LinearHead(4, outputs, CPU, build_task(task, outputs, weights))
    with torch.no_grad():
        head.weight.copy_(random_rows(outputs, 4, seed))
    return head


def test_weights_of_classes_are_those_of_the_weighted_cross_entropy():
    features, weights = random_rows(), torch.tensor([1.0, 5.0, 0.0])
    labels = torch.arange(12) % 3
    head = head_of("classes", 3, weights)
    logits = F.linear(standardised(features), head.weight, head.bias)
    expected = F.cross_entropy(logits, labels, weight=weights)
    (grad,) = torch.autograd.grad(expected, head.weight)
    _, loss = step(head, features, labels)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(head.weight.grad, grad, **f32(NETWORK, size=0.1))


def test_balanced_classes_weigh_by_how_often_they_were_seen_before():
    features, labels = random_rows(), torch.tensor([0] * 8 + [1] * 3 + [2])
    head = head_of("classes", 3, "balanced")
    _, first = step(head, features, labels)
    logits = F.linear(standardised(features), head.weight, head.bias)
    torch.testing.assert_close(first, F.cross_entropy(logits, labels).detach())  # nothing was seen before
    assert head.class_counts.tolist() == [8, 3, 1]
    _, second = step(head, features, labels)
    weights = torch.tensor([12 / (3 * 8), 12 / (3 * 3), 12 / (3 * 1)])
    torch.testing.assert_close(
        second, F.cross_entropy(logits, labels, weight=weights).detach(), **f32(NETWORK, size=0.1)
    )


def test_labels_of_their_own_are_logistic_regressions_that_leave_out_what_is_unknown():
    features, labels = random_rows(), torch.randint(-1, 2, (12, 3), generator=torch.Generator().manual_seed(3))
    valid = (labels >= 0).any(dim=1) & (torch.arange(12) != 4)
    head = head_of("multilabel", 3)
    x, total, known, grad = standardised(features).double(), 0.0, 0, torch.zeros(3, 4, dtype=torch.float64)
    for i in range(12):
        for c in range(3):
            if labels[i, c] >= 0 and valid[i]:
                p = torch.sigmoid(head.weight[c].double() @ x[i]).item()
                y = labels[i, c].item()
                total -= torch.tensor(p if y else 1 - p).log().item()
                grad[c] += (p - y) * x[i]
                known += 1
    _, loss = step(head, features, labels, valid)
    assert loss.item() == near(total / known)
    torch.testing.assert_close(head.weight.grad.double(), grad / (known / 3), **f32(NETWORK, size=0.1))


def test_numbers_are_least_squares_on_standardised_targets():
    features, targets = random_rows(), 1000 + 50 * random_rows(12, 2, seed=5)
    valid = torch.arange(12) < 10
    head = head_of("regression", 2)
    x, y = standardised(features)[:10], standardised(targets[:10])
    error = F.linear(x, head.weight) - y
    _, loss = step(head, features, targets, valid)
    torch.testing.assert_close(loss, error.square().mean().detach(), **f32(NETWORK))
    torch.testing.assert_close(head.weight.grad, error.T.detach() @ x / 10, **f32(TRAINING, size=0.1))
    torch.testing.assert_close(head.target_mean, targets[:10].mean(0))
    predicted = head(features[:10]).detach()
    expected = F.linear(x, head.weight) * targets[:10].std(0, unbiased=False) + targets[:10].mean(0)
    torch.testing.assert_close(predicted, expected.detach(), **f32(NETWORK, size=100))


def test_targets_that_come_late_are_standardised_by_themselves():
    features, targets = random_rows(), 1000 + 50 * random_rows(12, 1, seed=5)
    head, nobody = LinearHead(4, 1, CPU, build_task("regression", 1, None)), torch.zeros(12, dtype=torch.bool)
    for _ in range(60):
        step(head, features, torch.zeros(12, 1), nobody)
    step(head, features, targets)
    torch.testing.assert_close(head.target_mean, torch.full((1,), 10.0))  # cut at ten deviations, and on its way
    for _ in range(300):
        step(head, features, targets)
    assert head.target_mean.item() > 900


@pytest.mark.parametrize("task", ["classes", "multilabel", "regression"])
def test_autocast_changes_nothing(task):
    labels = {"classes": torch.arange(12) % 3, "multilabel": torch.ones(12, 3).long(), "regression": random_rows(12, 3)}
    plain, cast = head_of(task, 3), head_of(task, 3)
    expected, _ = step(plain, random_rows(), labels[task])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, _ = step(cast, random_rows(), labels[task])
        assert torch.equal(plain(random_rows()), cast(random_rows()))
    assert torch.equal(outputs, expected)
    assert torch.equal(plain.weight.grad, cast.weight.grad)


class Brightness(Plain):
    """Gives the mean of each channel, which tells targets made of them."""

    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "features": self(batch[0])}


def with_targets(make, count=48, seed=0):
    images, labels = images_and_labels(count, seed)
    images = images.float() / 255
    return DataLoader(list(zip(images, make(images, labels), strict=True)), batch_size=8)


def outputs_and_targets(probe, loader):
    images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return probe.head(images.mean((2, 3))).detach(), targets


def average_precision(scores, positives):
    order = scores.argsort(descending=True).tolist()
    found, total = 0, 0.0
    for place, i in enumerate(order, start=1):
        if positives[i]:
            found += 1
            total += found / place
    return total / found


def several_labels(images, labels):
    known = torch.stack([labels == 0, labels >= 1, images[:, 0].mean((1, 2)) > 0.4], dim=1).long()
    known[::5, 1] = -1
    known[3] = -1
    return known


@pytest.mark.slow
def test_several_labels_end_to_end():
    probe = OnlineLinearProbe(3, task="multilabel", dataloader=with_targets(several_labels))
    val = with_targets(several_labels, 40, seed=5)
    run = quiet_fit(Brightness(), [probe], val=val, max_epochs=6, num_sanity_val_steps=1)
    outputs, targets = outputs_and_targets(probe, val)
    rows = [(outputs[targets[:, c] >= 0, c], targets[targets[:, c] >= 0, c]) for c in range(3)]
    expected = sum(average_precision(o, t.tolist()) for o, t in rows) / 3
    assert run.callback_metrics["linear_probe/map"].item() == near(expected, size=1)
    f1 = []
    for out, target in rows:
        hit = ((out > 0) & (target == 1)).sum().item()
        f1.append(2 * hit / ((out > 0).sum().item() + (target == 1).sum().item()))
    assert run.callback_metrics["linear_probe/f1"].item() == near(sum(f1) / 3, size=1)
    assert expected > 0.9
    assert "linear_probe/top1" not in run.callback_metrics


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_numbers_end_to_end(scale):
    def numbers(images, labels):
        found = (images.mean((1, 2, 3)) * 3 + 7) * scale
        found[2] = float("nan")
        return found

    probe = OnlineLinearProbe(1, task="regression", bank="train")
    val = with_targets(numbers, 40, seed=5)
    run = quiet_fit(Brightness(), [probe], with_targets(numbers), val, max_epochs=8)
    outputs, targets = outputs_and_targets(probe, val)
    outputs, targets = outputs[:, 0][targets.isfinite()], targets[targets.isfinite()]
    error = outputs - targets
    r2 = 1 - error.square().sum() / (targets - targets.mean()).square().sum()
    assert run.callback_metrics["linear_probe/r2"].item() == pytest.approx(r2.item(), abs=1e-3)
    assert run.callback_metrics["linear_probe/mae"].item() == pytest.approx(error.abs().mean().item(), rel=1e-3)
    assert r2 > 0.9
    assert run.callback_metrics["linear_probe/train_loss"] < 0.5


def random_logits(rows=200, classes=8):
    generator = torch.Generator().manual_seed(4)
    return 2 * torch.randn(rows, classes, generator=generator), torch.randint(0, classes, (rows,), generator=generator)


def scored(logits, labels, valid):
    scores = ClassScores(logits.shape[1], CPU)
    for part in range(4):
        scores.update(logits[part::4], labels[part::4], valid[part::4])
    return scores.compute()


def test_top5_and_the_calibration_error_by_hand():
    logits, labels = random_logits()
    valid = torch.arange(200) % 7 != 0
    found = scored(logits, labels.masked_fill(~valid, 0), valid)
    p = torch.softmax(logits[valid].double(), dim=1)
    kept = labels[valid]
    best = p.argsort(dim=1, descending=True)
    for k in (1, 5):
        right = sum(label in row[:k] for row, label in zip(best.tolist(), kept.tolist(), strict=True))
        assert found[f"top{k}"].item() == near(right / len(kept))
    error = 0.0
    for low in range(15):
        inside = [i for i in range(len(kept)) if low / 15 < p[i].max() <= (low + 1) / 15]
        if inside:
            gap = sum((best[i, 0] == kept[i]).item() - p[i].max().item() for i in inside)
            error += abs(gap) / len(kept)
    assert found["calibration_error"].item() == near(error, size=1)
    assert ClassScores(5, CPU).ranks == (1, 5)
    assert ClassScores(4, CPU).ranks == (1,)


@pytest.mark.dist
def test_two_ranks_score_as_one_process_and_one_may_have_nothing():
    logits, labels = random_logits(40)
    everything = scored(logits, labels, torch.ones(40, dtype=torch.bool))

    def on_rank(rank):
        return scored(logits, labels, torch.full((40,), rank == 1))

    for found in run_processes(on_rank, 2):
        assert {k: v.item() for k, v in found.items()} == near({k: v.item() for k, v in everything.items()})


def test_too_few_images_give_nan_and_no_error():
    scores = RegressionScores(CPU)
    scores.update(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, dtype=torch.bool))
    assert scores.compute()["r2"].isnan()
    none = MultilabelScores(2, CPU)
    none.update(torch.zeros(3, 2), torch.zeros(3, 2).long(), torch.ones(3, dtype=torch.bool))
    assert none.compute().keys() == {"map", "f1"}


@pytest.mark.slow
def test_an_optimizer_and_a_schedule_of_ones_own_are_resumed(tmp_path):
    def probe():
        return OnlineLinearProbe(
            CLASSES,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
            schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5),
        )

    def run(epochs, ckpt_path=None):
        watched, module = probe(), classifier()()
        module.drop.p = 0.0
        trainer = quiet_fit(module, [watched], labelled(), max_epochs=epochs, ckpt_path=ckpt_path)
        return watched, trainer

    whole, _ = run(3)
    run(1)[1].save_checkpoint(tmp_path / "a.ckpt")
    resumed, _ = run(3, tmp_path / "a.ckpt")
    assert isinstance(whole.optimizer, torch.optim.AdamW)
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**3)  # 18 steps
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert equal_states(whole.head.state_dict(), resumed.head.state_dict())


def test_a_checkpoint_of_other_statistics_or_layers_is_refused():
    probe = OnlineLinearProbe(CLASSES)
    quiet_fit(classifier()(), [probe], max_epochs=1)
    balanced = OnlineLinearProbe(CLASSES, class_weights="balanced")
    balanced.load_state_dict(probe.state_dict())
    with pytest.raises(ValueError, match=r"must have the statistics that the checkpoint has, got \['class_counts'\]"):
        quiet_fit(classifier()(), [balanced], max_epochs=1)
    with pytest.raises(ValueError, match="`linear_probe` must have the layers that the checkpoint has"):
        OnlineLinearProbe(CLASSES, features=["backbone", "out"]).load_state_dict(probe.state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "labels"}, ValueError, "`task` must be one of 'classes', 'multilabel', 'regression', got 'labels'"),
        ({"task": "regression", "num_classes": 0}, ValueError, "`num_classes` must be >= 1"),
        ({"class_weights": "even"}, ValueError, "`class_weights` must be one of 'balanced'"),
        ({"class_weights": [1, 2]}, TypeError, '`class_weights` must be "balanced", a tensor or None'),
        ({"class_weights": torch.ones(2)}, ValueError, r"`class_weights` must have the shape \(3,\), got \(2,\)"),
        ({"class_weights": -torch.ones(3)}, ValueError, "`class_weights` must be finite and >= 0"),
        ({"class_weights": "balanced", "task": "multilabel"}, ValueError, "be None for the task 'multilabel'"),
        ({"optimizer": "sgd"}, TypeError, "`optimizer` must be callable, got 'str'"),
        ({"optimizer": torch.optim.SGD, "lr": 0.1}, ValueError, "`lr` must be None if there is an `optimizer`"),
    ],
)
def test_arguments_are_checked_when_they_are_given(arguments, error, message):
    with pytest.raises(error, match=message):
        OnlineLinearProbe(**({"num_classes": 3} | arguments))


@pytest.mark.parametrize(
    ("task", "labels", "error", "message"),
    [
        ("multilabel", torch.zeros(8, 2), ValueError, r"`labels` must have the shape \(B, 3\), got"),
        ("multilabel", torch.full((8, 3), 2), ValueError, "`labels` must be 0 or 1, or -1 where .* got 2"),
        ("multilabel", torch.full((8, 3), 0.5), ValueError, "`labels` must be 0 or 1"),
        ("regression", torch.zeros(8, 2), ValueError, r"`labels` must have the shape \(B, 3\), got \(8, 2\)"),
        ("regression", torch.full((8, 3), float("inf")), ValueError, "`labels` must be finite"),
        ("regression", torch.ones(8, 3).bool(), TypeError, "`labels` must be a tensor of numbers"),
    ],
)
def test_targets_that_do_not_fit_the_task_are_named(task, labels, error, message):
    data = [(torch.rand(8, 3, 8, 8), labels)]
    with pytest.raises(error, match=message):
        quiet_fit(Plain(), [OnlineLinearProbe(3, task=task, dataloader=data)], val=data, num_sanity_val_steps=0)
