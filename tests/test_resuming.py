"""Longer runs whose schedules do not jump, and starts from the weights of a backbone."""

from itertools import pairwise

import lightning as L
import pytest
import timm
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.resuming import HeadWarmup, extend_training, from_pretrained_backbone
from lightning_contrast.runtime.schedule_position import ScheduleExtension, schedule_position
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCHES, data, trainer
from tests.tolerances import ROUNDED, near, near64

STEPS = BATCHES  # of an epoch


@pytest.mark.parametrize(("done", "total", "end"), [(100, 100, 200), (100, 100, 110), (40, 100, 300), (7, 7, 8)])
def test_plan_has_no_jump_and_ends_where_the_old_one_did(done, total, end):
    plan = ScheduleExtension(done, total)
    places = [plan.at(step, end) for step in range(end + 1)]
    assert places[: done + 1] == list(range(done + 1))
    assert places[-1] == pytest.approx(total)
    assert all(0 <= place <= total for place in places)
    if done < total:  # stretched
        slopes = {round(b - a, 9) for a, b in pairwise(places[done:])}
        assert slopes == {round((total - done) / (end - done), 9)}
    elif end - done > 1:
        lowest = min(places[done:])
        assert lowest == pytest.approx(total * done / end, abs=total / (end - done))
        turn = places.index(lowest, done)
        assert places[done : turn + 1] == sorted(places[done : turn + 1], reverse=True)
        assert places[turn:] == sorted(places[turn:])
        assert turn - done == pytest.approx(max(1, 0.1 * (end - done)), abs=1)


def test_without_a_plan_nothing_changes():
    assert schedule_position(L.Trainer(logger=False, enable_checkpointing=False), 3, 10) == (3, 10)


class Record(L.Callback):
    """Notes what the schedules give in each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.note_momentum(trainer)
        self.seen.append({"lr": trainer.optimizers[0].param_groups[0]["lr"]})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[-1]["weight_decay"] = trainer.optimizers[0].param_groups[0]["weight_decay"]
        if "train/temperature" in trainer.callback_metrics:
            self.seen[-1]["temperature"] = float(trainer.callback_metrics["train/temperature"])

    def on_train_end(self, trainer, pl_module):
        self.note_momentum(trainer)

    def note_momentum(self, trainer):
        """The default callbacks of the module run after this one, so their values are those of the previous step."""
        if self.seen and "train/momentum" in trainer.callback_metrics:
            self.seen[-1]["momentum"] = float(trainer.callback_metrics["train/momentum"])


def run(tmp_path, name, epochs, make_module=None, extension=None, ckpt_path=None):
    record, module = Record(), (make_module or make)(name)
    callbacks = [record] if extension is None else [record, extension]
    fit = trainer(tmp_path, case_of(name), callbacks=callbacks, epochs=epochs, limit_val_batches=0)
    fit.fit(module, data(name), ckpt_path=ckpt_path, weights_only=True)
    fit.save_checkpoint(tmp_path / f"{name}-{epochs}.ckpt")
    return module, record.seen, tmp_path / f"{name}-{epochs}.ckpt"


def case_of(name):
    return CASES[name]


@pytest.mark.parametrize("name", ["DINO", "MSN", "BYOL"])
@pytest.mark.slow
def test_all_schedules_of_a_finished_run_go_back_and_on_together(name, tmp_path):
    _, first, checkpoint = run(tmp_path, name, 4)
    extension = extend_training(checkpoint, 4)
    assert extension.max_epochs == 8
    assert extension.plan == ScheduleExtension(4 * STEPS, 4 * STEPS)
    module, second, _ = run(tmp_path, name, 8, extension=extension, ckpt_path=extension.checkpoint)
    assert len(second) == 4 * STEPS
    reference = ScheduleExtension(4 * STEPS, 4 * STEPS)
    assert module.trainer.global_step == 8 * STEPS
    keys = set(first[0]) - {"temperature"}
    assert {"lr", "momentum"} <= keys
    for key in keys:
        values = [entry[key] for entry in first + second]
        largest = max(abs(b - a) for a, b in pairwise(values))
        ramp = 0.6 * (max(values) - min(values)) + 1e-12  # a tenth of the added steps goes back half of the way
        assert largest <= ramp, key
        assert values[4 * STEPS] == pytest.approx(values[4 * STEPS - 1], abs=ramp)
    # the momentum of update k is that of the old plan at the step given by the new plan
    update = next(c for c in module.trainer.callbacks if isinstance(c, lc.callbacks.MomentumUpdate))
    for index, entry in enumerate(second):
        place = reference.at(4 * STEPS + index, 8 * STEPS)
        assert entry["momentum"] == near(update.momentum_at(place, 4 * STEPS), ROUNDED, size=1)
    for index, entry in enumerate(second):
        place = reference.at(4 * STEPS + index, 8 * STEPS)
        assert entry["lr"] == near64(0.05 * module.lr_factor(place, 0, 4 * STEPS))


@pytest.mark.slow
def test_weight_decay_and_temperature_follow_the_same_place(tmp_path):
    _, _, checkpoint = run(tmp_path, "DINO", 2)
    extension = extend_training(checkpoint, 2)
    module, second, _ = run(tmp_path, "DINO", 4, extension=extension, ckpt_path=checkpoint)
    final = module.schedules.final_weight_decay
    for index, entry in enumerate(second):
        place = extension.plan.at(2 * STEPS + index, 4 * STEPS)
        expected = lc.optim.weight_decay_cosine(place, 2 * STEPS, module.weight_decay, final)
        assert entry["weight_decay"] == near64(expected)

    schedule = lc.nn.ScheduledTemperature(0.5, 0.1)

    def scheduled(name):
        return make(name, temperature=schedule)

    _, _, checkpoint = run(tmp_path, "SimCLR", 2, scheduled)
    extension = extend_training(checkpoint, 2)
    _, second, _ = run(tmp_path, "SimCLR", 4, scheduled, extension=extension, ckpt_path=checkpoint)
    final = module.schedules.final_weight_decay
    for index, entry in enumerate(second):
        place = extension.plan.at(2 * STEPS + index, 4 * STEPS)
        assert entry["temperature"] == near(schedule(place, 2 * STEPS), ROUNDED)


@pytest.mark.slow
def test_a_run_on_the_way_is_stretched(tmp_path):
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    record = Record()
    fit = trainer(tmp_path, case_of("BYOL"), callbacks=[Stop(), record], epochs=4, limit_val_batches=0)
    fit.fit(make("BYOL"), data("BYOL"))
    fit.save_checkpoint(tmp_path / "way.ckpt")
    extension = extend_training(tmp_path / "way.ckpt", 4, planned_epochs=4)
    assert (extension.max_epochs, extension.plan) == (8, ScheduleExtension(2 * STEPS, 4 * STEPS))
    module, second, _ = run(tmp_path, "BYOL", 8, extension=extension, ckpt_path=extension.checkpoint)
    rates = [entry["lr"] for entry in record.seen + second]
    assert all(b < a for a, b in pairwise(rates)), "no jump up"
    last = 4 * STEPS - 1 / 3  # of the old steps: three new ones are one of them
    assert rates[-1] == pytest.approx(0.05 * module.lr_factor(last, 0, 4 * STEPS))


@pytest.mark.slow
def test_a_stop_within_the_extension_resumes_exactly(tmp_path):
    _, _, checkpoint = run(tmp_path, "DINO", 1)
    whole, _, _ = run(tmp_path, "DINO", 3, extension=extend_training(checkpoint, 2), ckpt_path=checkpoint)

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    module = make("DINO")
    callbacks = [extend_training(checkpoint, 2), Save()]
    fit = trainer(tmp_path, case_of("DINO"), callbacks=callbacks, epochs=3, limit_val_batches=0)
    fit.fit(module, data("DINO"), ckpt_path=checkpoint, weights_only=True)
    resumed, _, _ = run(
        tmp_path, "DINO", 3, extension=extend_training(checkpoint, 2), ckpt_path=tmp_path / "within.ckpt"
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_extension_refuses(tmp_path):
    _, _, checkpoint = run(tmp_path, "SimCLR", 1)
    with pytest.raises(ValueError, match="`more_epochs` must be >= 1"):
        extend_training(checkpoint, 0)
    extension = extend_training(checkpoint, 2)
    with pytest.raises(ValueError, match="`max_epochs` must be 3 for this extension, got 5"):
        run(tmp_path, "SimCLR", 5, extension=extension, ckpt_path=checkpoint)
    with pytest.raises(ValueError, match="`ckpt_path` must lead to step 4"):
        run(tmp_path, "SimCLR", 3, extension=extension)
    with pytest.raises(ValueError, match="`planned_epochs` must be >= 1"):
        extend_training(checkpoint, 2, planned_epochs=0)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="`checkpoint` must be a Lightning checkpoint"):
        extend_training(tmp_path / "other.pt", 2)


# ------------------------------------------------------------------------------------------ pretrained backbones


def backbone_like():
    torch.manual_seed(7)
    return TinyBackbone(True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["SimCLR", "BYOL", "DINO"])
@pytest.mark.parametrize("form", ["module", "state", "file", "checkpoint"])
def test_student_and_teacher_start_from_the_weights(name, form, tmp_path):
    source = backbone_like()
    weights = {"module": source, "state": source.state_dict() | {"fc.weight": torch.ones(2, 8)}}.get(form)
    if form == "file":
        weights = tmp_path / "weights.pt"
        torch.save(source.state_dict(), weights)
    elif form == "checkpoint":
        weights = tmp_path / "run.ckpt"
        state = {f"backbone.{key}": value for key, value in source.state_dict().items()} | {
            "projector.w": torch.ones(1)
        }
        torch.save({"state_dict": state}, weights)
    module = make(name)
    heads = {key: value.clone() for key, value in module.projector.state_dict().items()}
    assert from_pretrained_backbone(module, weights) is module
    assert equal(module.backbone.state_dict(), source.state_dict())
    assert equal(module.projector.state_dict(), heads)
    for online, momentum in getattr(module, "momentum_pairs", list)():
        assert equal(online.state_dict(), momentum.state_dict())


def test_a_masked_transformer_takes_the_weights_of_the_timm_network():
    module = make("IBOT")
    source = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=5
    )
    from_pretrained_backbone(module, source)
    given = source.state_dict()
    for key, value in module.momentum_backbone.vit.state_dict().items():
        assert torch.equal(value, given[key])


def test_head_warmup_keeps_the_backbone_and_then_lets_it_go(tmp_path):
    class Watch(L.Callback):
        def __init__(self):
            self.moved = []

        def on_train_epoch_start(self, trainer, pl_module):
            parts = (pl_module.backbone, pl_module.projector, pl_module.momentum_backbone)
            self.before = [[p.detach().clone() for p in part.parameters()] for part in parts]
            self.parts = parts

        def on_train_epoch_end(self, trainer, pl_module):
            now = [[p.detach() for p in part.parameters()] for part in self.parts]
            pairs = [list(zip(a, b, strict=True)) for a, b in zip(now, self.before, strict=True)]
            self.moved.append([any(not torch.equal(a, b) for a, b in pair) for pair in pairs])

    watch = Watch()
    module = from_pretrained_backbone(make("BYOL"), backbone_like(), head_warmup_epochs=1)
    fit = trainer(tmp_path, case_of("BYOL"), callbacks=[watch], epochs=2, limit_val_batches=0)
    fit.fit(module, data("BYOL"))
    assert watch.moved == [[False, True, False], [True, True, True]]
    assert sum(isinstance(c, HeadWarmup) for c in fit.callbacks) == 1
    assert any(isinstance(c, lc.callbacks.MomentumUpdate) for c in fit.callbacks)


def test_no_warmup_adds_no_callback(tmp_path):
    module = from_pretrained_backbone(make("SimCLR"), backbone_like(), head_warmup_epochs=0)
    fit = trainer(tmp_path, case_of("SimCLR"), epochs=1, limit_val_batches=0, limit_train_batches=1)
    fit.fit(module, data("SimCLR"))
    assert not any(isinstance(c, HeadWarmup) for c in fit.callbacks)


def test_skip_leaves_a_stem_at_random():
    source = {k: v for k, v in backbone_like().state_dict().items() if not k.startswith("layers.0")}
    module = make("BYOL")
    stem = module.backbone.layers[0].weight.clone()
    from_pretrained_backbone(module, source, skip=["layers.0."])
    assert torch.equal(module.backbone.layers[0].weight, stem)
    assert torch.equal(module.momentum_backbone.layers[3].weight, source["layers.3.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("layers.3.weight"), "1 that are missing, first 'layers.3.weight'"),
        (lambda state: state.update(extra=torch.ones(1)), "1 that are not in the backbone, first 'extra'"),
        (lambda state: state.update({"layers.0.bias": torch.ones(3)}), "have another shape, first 'layers.0.bias'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_changed(change, words):
    state, module = dict(backbone_like().state_dict()), make("SimCLR")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        from_pretrained_backbone(module, state)
    assert equal(before, module.state_dict())


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match="`module` must be a method of this package"):
        from_pretrained_backbone(nn.Identity(), {})
    with pytest.raises(TypeError, match="`weights` must be the weights of a network"):
        from_pretrained_backbone(make("SimCLR"), 3)
    with pytest.raises(ValueError, match="`head_warmup_epochs` must be >= 0"):
        from_pretrained_backbone(make("SimCLR"), {}, head_warmup_epochs=-1)
