"""Measurements, findings, logged values, checkpoints and errors of `CollapseMonitor`."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import lightning_contrast as lc
from lightning_contrast.callbacks import CollapseMonitor, Thresholds
from lightning_contrast.callbacks.collapse.diagnosis import diagnose
from lightning_contrast.callbacks.collapse.measurements import RollingBuffer, measure, measure_pairs, measure_scores
from lightning_contrast.callbacks.collapse.model_facts import Facts, read_facts
from tests.callbacks.monitor_modules import Queued, TwoViews, views_loader
from tests.callbacks.probe_modules import adversary, classifier, labelled, quiet_fit
from tests.callbacks.strategies import fit_ranks
from tests.launch import run_processes
from tests.tolerances import NETWORK, ROUNDED, f32, near

pytestmark = pytest.mark.filterwarnings("ignore:CollapseMonitor:UserWarning")


# Measurements.


def sample(seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(40, 6, generator=g) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.0]) + 0.4
    return rows, torch.arange(40) // 10


def numbers_by_hand(rows, batches):
    x = rows.double().numpy()
    unit = [row / np.linalg.norm(row) for row in x]
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    centred = x - x.mean(axis=0)
    eigenvalues = np.linalg.svd(centred, compute_uv=False) ** 2
    values = np.linalg.svd(x, compute_uv=False)
    p, q = values / values.sum() + 1e-7, eigenvalues**0.5 / (eigenvalues**0.5).sum()
    deviations = x.std(axis=0)
    inside = [x[batches.numpy() == b] for b in set(batches.tolist())]
    freedom = sum(len(part) - 1 for part in inside)
    return {
        "std": np.std(unit, axis=0).mean() * 6**0.5,
        "mean_cosine": sum(unit[i] @ unit[j] for i, j in pairs) / len(pairs),
        "rankme": math.exp(-(p * np.log(p)).sum()),
        "effective_rank": math.exp(-sum(v * math.log(v) for v in q if v > 1e-12)),
        "participation_ratio": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "uniformity": math.log(sum(math.exp(-2 * np.sum((unit[i] - unit[j]) ** 2)) for i, j in pairs) / len(pairs)),
        "dead_dims": 1 / 6,
        "within_batch_std": sum(((part - part.mean(axis=0)) ** 2).sum() for part in inside)
        / freedom
        / x.var(axis=0, ddof=1).sum(),
        "norm": np.mean([np.linalg.norm(row) for row in x]),
        "rms": math.sqrt((deviations**2).sum()),
        "finite": 1.0,
    }


def test_the_numbers_equal_plain_loops():
    rows, batches = sample()
    values, spectrum = measure(rows, batches)
    alpha = values.pop("alpha_req")
    assert values == near(numbers_by_hand(rows, batches), NETWORK)
    assert alpha > 0
    expected = torch.linalg.svdvals(rows.double())
    torch.testing.assert_close(spectrum, expected, **f32(ROUNDED))


def test_batches_that_hang_together_are_seen():
    rows, batches = sample()
    moved = rows + 50.0 * (torch.arange(4) - 1.5).view(-1, 1)[batches]
    assert measure(moved, batches)[0]["within_batch_std"] < 0.01
    assert measure(moved, torch.arange(40) % 4)[0]["within_batch_std"] > 0.9


def test_rows_that_are_not_finite_are_counted_and_left_out():
    rows, batches = sample()
    broken = torch.cat([rows, torch.full((10, 6), math.nan)])
    values, _ = measure(broken, torch.cat([batches, batches[:10]]))
    assert values.pop("finite") == pytest.approx(0.8)
    expected, _ = measure(rows, batches)
    del expected["finite"]
    assert values == pytest.approx(expected)
    assert measure(torch.full((40, 6), math.inf), batches)[0] == {"finite": 0.0}


def test_pairs_and_scores_equal_plain_loops():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(12, 5, generator=g)
    b = a + 0.5 * torch.randn(12, 5, generator=g)
    cosines = torch.nn.functional.cosine_similarity(a.unsqueeze(1), b.unsqueeze(0), dim=2).double()
    positive = cosines.diagonal().mean().item()
    others = (cosines.sum().item() - 12 * positive) / (12 * 11)
    expected = {"alignment": 2 - 2 * positive, "positive_cosine": positive}
    assert measure_pairs(a, b) == near(expected | {"margin": (positive - others) / (1 - others)})
    p = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.2, 0.2], [0.1, 0.9, 0.0], [0.8, 0.1, 0.1]], dtype=torch.float64)
    entropies = torch.special.entr(p).sum(dim=1)
    values = measure_scores(p.argmax(dim=1), entropies, p.mean(dim=0))
    used = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    mean = [0.55, 0.375, 0.075]
    assert values == near(
        {
            "prototypes": used,
            "prototype_use": used / 3,
            "teacher_entropy": entropies.mean().item() / math.log(3),
            "mean_entropy": -sum(v * math.log(v) for v in mean) / math.log(3),
            "possible": 3.0,
        }
    )


# Findings.

GOOD = {
    "finite": 1.0,
    "std": 0.9,
    "mean_cosine": 0.1,
    "rankme": 30.0,
    "effective_rank": 30.0,
    "participation_ratio": 5.0,
    "uniformity": -2.5,
    "dead_dims": 0.0,
    "within_batch_std": 1.0,
    "norm": 3.0,
    "rms": 3.0,
    "width": 128.0,
    "rows": 512.0,
    "alignment": 1.0,
    "positive_cosine": 0.5,
    "margin": 0.5,
}
SCORES = {
    "prototypes": 40.0,
    "prototype_use": 0.2,
    "teacher_entropy": 0.5,
    "mean_entropy": 0.9,
    "possible": 256.0,
}
CONDITIONS = {
    "complete collapse": ("projections", {"std": 0.02, "mean_cosine": 0.999}, Facts()),
    "dimensional collapse": ("projections", {"effective_rank": 3.0}, Facts()),
    "collapse within batches": ("features", {"within_batch_std": 0.1}, Facts()),
    "over-uniformity": ("projections", {"margin": 0.001, "uniformity": -3.8}, Facts()),
    "dead dimensions": ("features", {"dead_dims": 0.7}, Facts()),
    "norm drift": ("features", {"norm": 300.0}, Facts()),
    "prototype collapse": ("scores", {"prototypes": 1.2, "teacher_entropy": 0.01}, Facts(center="present")),
    "uniform collapse": ("scores", {"teacher_entropy": 0.999, "mean_entropy": 1.0}, Facts(center="present")),
    "teacher diverged": ("teacher", {"margin": 0.01}, Facts()),
    "stale queue": ("queue", {"staleness_cosine": 0.05}, Facts()),
    "NaN": ("projections", {"finite": 0.9}, Facts()),
}


def history_of(space=None, changes=(), healthy=2, unhealthy=2):
    """Return a history that is healthy and then shows a condition."""
    records = []
    for number in range(healthy + unhealthy):
        record = {
            "step": 100 * number,
            "loss": 1.0,
            "features": dict(GOOD),
            "projections": dict(GOOD),
            "teacher": {"margin": 0.5, "positive_cosine": 0.6, "alignment": 0.8},
            "scores": dict(SCORES),
            "queue": {"staleness_cosine": 0.8},
        }
        if space is not None and number >= healthy:
            record[space] |= changes
        records.append(record)
    return records


@pytest.mark.parametrize("kind", CONDITIONS)
def test_each_condition_is_named_alone_and_with_its_numbers(kind):
    space, changes, facts = CONDITIONS[kind]
    (finding,) = diagnose(history_of(space, changes), facts, Thresholds())
    assert (finding.kind, finding.space, finding.step) == (kind, space, 300)
    assert kind in str(finding)
    assert finding.evidence
    assert finding.advice
    assert diagnose(history_of(), facts, Thresholds()) == []


@pytest.mark.parametrize("kind", [kind for kind in CONDITIONS if kind != "NaN"])
def test_one_measurement_is_not_enough(kind):
    space, changes, facts = CONDITIONS[kind]
    assert diagnose(history_of(space, changes, healthy=3, unhealthy=1), facts, Thresholds()) == []
    assert diagnose(history_of(space, changes, healthy=0, unhealthy=2), facts, Thresholds()) == []


def test_the_example_reads_as_promised():
    history = history_of("projections", {"std": 0.023, "mean_cosine": 0.9995})
    facts = Facts(predictor="present", predictor_lr=0.0)
    text = str(diagnose(history, facts, Thresholds())[0])
    assert "embedding std 0.002, expected 0.088 on the sphere of 128 dimensions" in text
    assert "at step 300" in text
    assert "learning rate of the predictor is 0" in text


def test_what_rises_from_a_low_start_is_no_collapse():
    history = history_of()
    for record, value in zip(history, (0.01, 0.03, 0.06, 0.1), strict=True):
        record["projections"]["std"] = value
    assert diagnose(history, Facts(), Thresholds()) == []
    poor = history_of("projections", {"effective_rank": 3.0}, healthy=0, unhealthy=4)  # never had more dimensions
    assert diagnose(poor, Facts(), Thresholds()) == []


def test_a_shrinking_of_length_alone_is_no_collapse():
    changes = {"rms": 0.2, "norm": 0.2}
    assert diagnose(history_of("projections", changes), Facts(), Thresholds()) == []
    (finding,) = diagnose(
        history_of("projections", changes | {"margin": 0.1}), Facts(variance_weight=0.0), Thresholds()
    )
    assert (finding.kind, finding.cause) == ("complete collapse", "no variance term")


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        (Facts(predictor="present", predictor_lr=0.05), "no stop-gradient"),
        (Facts(predictor="present", predictor_lr=0.0), "predictor does not learn"),
        (Facts(predictor="identity", teacher=True), "no predictor"),
        (Facts(predictor="missing", teacher=True), "no predictor"),
        (Facts(predictor="present", teacher=True), ""),
        (Facts(predictor="missing"), ""),
        (Facts(variance_weight=0.0, predictor="missing"), "no variance term"),
        (Facts(negatives=True, temperature=0.1, predictor="present"), ""),
    ],
    ids=str,
)
def test_the_cause_of_a_complete_collapse(facts, cause):
    history = history_of("projections", {"std": 0.02, "mean_cosine": 0.999})
    assert diagnose(history, facts, Thresholds())[0].cause == cause


def test_facts_are_read_from_a_module():
    trainer = type("Trainer", (), {})()
    module = lc.SimSiam("small_convnet", backbone_kwargs={"width": 2}, projection_dim=8, predictor_dim=4)
    slow = torch.optim.SGD([*module.backbone.parameters()], lr=0.1)
    slow.add_param_group({"params": [*module.predictor.parameters()], "lr": 0.0})
    trainer.optimizers = [slow]
    facts = read_facts(trainer, module)
    assert (facts.predictor, facts.predictor_lr, facts.teacher, facts.negatives) == ("present", 0.0, False, False)
    facts = read_facts(trainer, Queued())
    assert (facts.predictor, facts.teacher, facts.negatives, facts.temperature) == ("missing", True, True, 0.5)
    options = {"backbone_kwargs": {"width": 2}, "hidden_dim": 8, "projection_dim": 8}
    trainer.optimizers = []
    facts = read_facts(trainer, lc.BYOL("small_convnet", **options, predictor=nn.Identity()))
    assert (facts.predictor, facts.teacher, facts.negatives) == ("identity", True, False)
    assert read_facts(trainer, lc.VICReg("small_convnet", **options, variance_weight=0.0)).variance_weight == 0


# Logged values and checkpoints.


def test_numbers_of_every_space_reach_callback_metrics_without_a_logger():
    monitor = CollapseMonitor(every_n_steps=4)
    run = quiet_fit(Queued(), [lc.MomentumUpdate(0.9), lc.QueueUpdate(), monitor], views_loader(), max_epochs=2)
    keys = run.callback_metrics.keys()
    names = (
        "rankme",
        "std",
        "mean_cosine",
        "effective_rank",
        "participation_ratio",
        "alpha_req",
        "uniformity",
        "within_batch_std",
    )
    assert {f"collapse/{name}" for name in names} <= keys
    assert {f"collapse/projections/{name}" for name in names} <= keys
    assert "collapse/teacher/margin" in keys
    assert [record["step"] for record in monitor.history] == [4, 8]
    run = quiet_fit(TwoViews(), [CollapseMonitor(every_n_steps=4, name="other")], views_loader(), max_epochs=1)
    assert {"other/projections/alignment", "other/projections/margin"} <= run.callback_metrics.keys()


@pytest.mark.parametrize("joined", [True, False])
def test_the_rows_are_those_of_the_step(joined):
    seen = []

    class Keeps(TwoViews):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            seen.append((outputs["features"].clone(), *self.last))
            return outputs

    monitor = CollapseMonitor(every_n_steps=4)
    quiet_fit(Keeps(joined=joined), [monitor], views_loader(), max_epochs=1)
    features, a, b = (torch.cat(column) for column in zip(*seen, strict=True))
    batches = torch.arange(4).repeat_interleave(16)
    for space, rows in (("features", features), ("projections", a)):
        expected, spectrum = measure(rows, batches)
        found = {name: monitor.history[0][space][name] for name in expected}
        assert found == pytest.approx(expected)
        torch.testing.assert_close(monitor._spectra[space], spectrum.float())
    assert monitor.history[0]["projections"]["positive_cosine"] == pytest.approx(measure_pairs(a, b)["positive_cosine"])


def test_measurements_come_after_8_batches_and_then_every_n():
    monitor = CollapseMonitor(every_n_steps=12)
    quiet_fit(TwoViews(), [monitor], views_loader(416), max_epochs=1)
    assert [record["step"] for record in monitor.history] == [8, 12, 24]
    assert [record["features"]["rows"] for record in monitor.history] == [128, 64, 128]
    monitor = CollapseMonitor(every_n_steps=None)
    run = quiet_fit(TwoViews(), [monitor], views_loader(), max_epochs=2)
    assert [record["step"] for record in monitor.history] == [4, 8]
    assert "collapse/rankme" in run.callback_metrics


def test_rows_are_bounded_and_so_is_the_history(monkeypatch):
    monkeypatch.setattr("lightning_contrast.callbacks.collapse.monitor.MAX_HISTORY", 3)
    monitor, kept, add = CollapseMonitor(every_n_steps=2, samples=40), [], RollingBuffer.add
    monkeypatch.setattr(RollingBuffer, "add", lambda self, entry: (kept.append(entry), add(self, entry)))
    quiet_fit(TwoViews(), [monitor], views_loader(192), max_epochs=1)
    assert [record["step"] for record in monitor.history] == [2, 10, 12]
    assert all(record["features"]["rows"] == 10 for record in monitor.history)
    sizes = {name: value.untyped_storage().nbytes() / 4 for name, value in kept[0].items()}
    assert sizes == {"features": 5 * 24, "projections": 2 * 5 * 12}  # not a slice of the batch


def test_a_module_that_knows_nothing_of_us():
    for module in (classifier()(), adversary(L.LightningModule)()):
        monitor = CollapseMonitor(every_n_steps=3)
        run = quiet_fit(module, [monitor], labelled(shuffle=True), max_epochs=1)
        assert set(monitor.history[0]) == {"step", "features"} | ({"loss"} if module.automatic_optimization else set())
        assert "collapse/std" in run.callback_metrics


def test_a_memory_bank_tells_how_stale_its_keys_are():
    class Bank(TwoViews):
        def __init__(self):
            super().__init__(lr=1e-3)
            self.bank = lc.nn.MemoryBank(64, 12, momentum=0.0)

        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return outputs | {"keys": self.last[0], "indices": batch[2]}

        def queues(self):
            return {"keys": self.bank}

    batches = [(*batch, torch.arange(16 * i, 16 * i + 16)) for i, batch in enumerate(views_loader())]
    module, monitor = Bank(), CollapseMonitor(every_n_steps=4)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    quiet_fit(module, [lc.QueueUpdate(), monitor], loader, max_epochs=2)
    first, second = (record["queue"]["staleness_cosine"] for record in monitor.history)
    assert abs(first) < 0.3  # random rows
    assert 0.7 < second <= 1  # the keys of an epoch ago


def test_the_teacher_is_read_from_the_keys_whose_order_is_right():
    class Shuffles(Queued):
        def training_step(self, batch, batch_idx):
            (view_q, view_k), _ = batch
            query = self.projector(self.backbone(view_q))
            key = self.momentum_projector(self.momentum_backbone(view_k.flip(0))).flip(0)
            return {"loss": query.square().mean(), "features": query.detach(), "keys": key}

    monitor = CollapseMonitor(every_n_steps=4)
    quiet_fit(Shuffles(), [lc.QueueUpdate(), monitor], views_loader(), max_epochs=1)
    assert monitor.history[0]["teacher"]["margin"] > 0.3  # 0 between different images


class Constant(TwoViews):
    """All projections are equal after four steps."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step >= 4:
            with torch.no_grad():
                self.projector[0].weight.zero_()


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_an_alarm_warns_once_saves_its_evidence_and_may_stop(action, tmp_path):
    monitor = CollapseMonitor(every_n_steps=4, action=action, snapshot_dir=tmp_path / "evidence")
    with pytest.warns(UserWarning, match=r"complete collapse of the projections.*embedding std") as warned:
        run = quiet_fit(Constant(), [monitor], views_loader(), max_epochs=6)
    assert len([w for w in warned if "CollapseMonitor" in str(w.message)]) == 1
    assert run.global_step == (12 if action == "stop" else 24)
    assert [(finding.kind, finding.step) for finding in monitor.findings] == [("complete collapse", 12)]
    (path,) = (tmp_path / "evidence").iterdir()
    evidence = torch.load(path, weights_only=True)
    assert evidence["rows"]["projections"].shape == (64, 12)
    assert len(evidence["history"]) == 3
    assert "complete collapse" in evidence["findings"][0]
    assert evidence["spectra"].keys() == evidence["first_spectra"].keys() == {"features", "projections"}


def test_features_that_are_not_finite_are_named(tmp_path):
    class Breaks(TwoViews):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step >= 6:
                with torch.no_grad():
                    self.backbone[1].weight.fill_(math.nan)

    monitor = CollapseMonitor(every_n_steps=4, snapshot_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"NaN of the projections.*50% of the rows are NaN"):
        run = quiet_fit(Breaks(), [monitor], views_loader(), max_epochs=3)
    assert {finding.kind for finding in monitor.findings} == {"NaN"}
    assert run.callback_metrics["collapse/finite"].item() == 0


@pytest.mark.slow
def test_spectra_are_drawn_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pytest.importorskip("matplotlib")
    logger = TensorBoardLogger(tmp_path, name="", version="")
    quiet_fit(TwoViews(), [CollapseMonitor(every_n_steps=4)], views_loader(), max_epochs=2, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["collapse/spectrum"]
    assert [event.step for event in events.Scalars("collapse/rankme")] == [4, 8]  # whatever log_every_n_steps is


def histories_equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(str(x[key]) == str(y[key]) for key in x) for x, y in zip(a, b, strict=True)
    )


def test_a_resumed_run_measures_what_the_run_that_was_not_stopped_did(tmp_path):
    def run(epochs, ckpt_path=None):
        monitor = CollapseMonitor(every_n_steps=6)  # epochs have 4 batches: a measurement spans the checkpoint
        module = TwoViews()
        module.backbone[3].p = 0.0
        trainer = quiet_fit(module, [monitor], views_loader(), max_epochs=epochs, ckpt_path=ckpt_path)
        return trainer, monitor

    _, whole = run(3)
    half, _ = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["CollapseMonitor[collapse]"]
    assert len(state["buffer"][0]) == 4
    _, resumed = run(3, tmp_path / "half.ckpt")
    assert [record["step"] for record in whole.history] == [6, 12]
    assert histories_equal(whole.history, resumed.history)


def test_a_second_fit_begins_a_new_history():
    monitor = CollapseMonitor(every_n_steps=4)
    trainer = quiet_fit(TwoViews(), [monitor], views_loader(), max_epochs=1)
    trainer.fit_loop.max_epochs = 3
    module = TwoViews()
    quiet_fit(module, [], views_loader(), trainer=trainer)
    assert [record["step"] for record in monitor.history] == [8, 12]
    assert not any(layer._forward_hooks for layer in module.modules())


def history_of_rank(rank, folder):
    monitor = CollapseMonitor(every_n_steps=4, samples=64, snapshot_dir=folder)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return views_loader(128)

    trainer = fit_ranks(TwoViews(), [monitor], Data(), "ddp", limit_val_batches=0, max_epochs=1)
    trainer.strategy.barrier()
    return monitor.history, [len(entries) for entries in monitor._buffer.state()]


@pytest.mark.dist
def test_two_ranks_measure_the_rows_of_both(tmp_path):
    (first, states), (second, _) = run_processes(history_of_rank, 2, str(tmp_path), init=False)
    assert histories_equal(first, second)
    assert [record["features"]["rows"] for record in first] == [32]  # 4 batches, 4 images of each rank's
    assert states == [0, 0]


# Errors.


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"(?s)`features` must name a submodule of TwoViews.*Near names: 'backbone"):
        quiet_fit(TwoViews(), [CollapseMonitor("backbon.1")], views_loader())
    with pytest.raises(ValueError, match=r"(?s)`features` must name a submodule of TwoViews.*Near names: 'projector'"):
        quiet_fit(TwoViews(), [CollapseMonitor(projections="projecter")], views_loader())
    module = TwoViews()
    module.other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"`projections` must be a layer whose .*'other', which was not called"):
        quiet_fit(module, [CollapseMonitor(projections="other")], views_loader())
    with pytest.raises(ValueError, match="`action` must be one of 'warn', 'stop'"):
        CollapseMonitor(action="pause")
    with pytest.raises(ValueError, match="`every_n_steps` must be >= 1"):
        CollapseMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="`samples` must be >= 16"):
        CollapseMonitor(samples=8)
    with pytest.raises(TypeError, match="`projections` must be a name or None"):
        CollapseMonitor(projections=3)
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's own word for equal names
        quiet_fit(TwoViews(), [CollapseMonitor(), CollapseMonitor()], views_loader())
