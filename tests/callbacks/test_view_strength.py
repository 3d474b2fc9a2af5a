"""A curriculum of strengths: a function of the optimizer step, exact after a stop, logged, and never too long."""

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_contrast import augment
from lightning_contrast.augment import StrengthSchedule
from lightning_contrast.callbacks import ViewAugmentation, ViewLogger
from tests.callbacks.picture_runs import pictures
from tests.callbacks.test_view_augmentation import IMAGES, LABELS, Policy, Sees, loader, run_fit


class Strengths(L.Callback):
    """Notes the strength of each batch, and what was logged."""

    def __init__(self):
        self.seen, self.logged = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.callbacks[0].current_strength)
        self.logged.append(float(trainer.callback_metrics.get("train/view_strength", -1)))


def run(strength, module=None, callbacks=(), policy=None, **settings):
    notes, policy = Strengths(), policy or augment.simclr_views(8)
    views = ViewAugmentation(policy, seed=0, strength=strength)
    trainer = run_fit(module or Sees(), [views, notes, *callbacks], loader(batches=4), **settings)
    return notes, trainer, policy


def test_it_follows_the_optimizer_steps_of_the_run_and_is_logged():
    notes, _, policy = run(StrengthSchedule(0.0, 1.0), max_epochs=2)
    assert notes.seen == pytest.approx([step / 8 for step in range(8)])
    assert notes.logged == pytest.approx(notes.seen)
    assert policy.strength == 1.0  # as before the run


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (StrengthSchedule(0.2, 1.0, epochs=1), [0.2, 0.2, 0.6, 0.6, 1.0, 1.0, 1.0, 1.0]),  # two steps an epoch
        (StrengthSchedule(1.0, 0.0, steps=4), [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        (lambda step: 0.1 * step, [0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3]),
    ],
)
def test_accumulated_batches_of_a_step_share_a_strength(schedule, expected):
    notes, *_ = run(schedule, max_epochs=2, accumulate_grad_batches=2)
    assert notes.seen == pytest.approx(expected)


def test_a_number_is_constant_and_not_logged_and_the_views_are_those_of_the_policy():
    plain, given = Sees(), Sees()
    notes, *_ = run(1.0, given)
    run(None, plain)
    assert notes.logged == [-1.0] * 4
    for one, other in zip(plain.seen["train"], given.seen["train"], strict=True):
        assert torch.equal(one[0][0], other[0][0])
    weak = augment.simclr_views(8)
    weak.set_strength(0.25)
    by_policy, by_callback = Sees(), Sees()
    *_, policy = run(None, by_policy, policy=weak)
    run(0.25, by_callback)
    assert policy.strength == 0.25
    assert torch.equal(by_policy.seen["train"][3][0][1], by_callback.seen["train"][3][0][1])


@pytest.mark.filterwarnings("ignore")
def test_a_stopped_and_resumed_run_sees_the_same_views(tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    whole, resumed, schedule = Sees(), Sees(), StrengthSchedule(0.1, 0.9, shape="cosine")
    run(schedule, whole, [Save()], max_epochs=2)
    notes, views = Strengths(), ViewAugmentation(augment.simclr_views(8), seed=0, strength=schedule)
    trainer = L.Trainer(max_epochs=2, callbacks=[views, notes], logger=False, enable_checkpointing=False)
    trainer.fit(resumed, loader(batches=4), ckpt_path=tmp_path / "stop.ckpt", weights_only=True)
    assert len(resumed.seen["train"]) == 4
    for one, other in zip(whole.seen["train"][4:], resumed.seen["train"], strict=True):
        assert torch.equal(one[0][0], other[0][0])


def test_the_picture_says_the_strength(tmp_path):
    folders = {name: tmp_path / name for name in ("without", "half", "three quarters")}
    for name, strength in zip(folders, (None, 0.5, 0.75), strict=True):
        run(strength, callbacks=[ViewLogger(2, png_dir=folders[name])], default_root_dir=tmp_path)
    shown = {name: next(iter(pictures(folder).values())) for name, folder in folders.items()}
    margin = shown["half"].shape[1] - shown["without"].shape[1]
    assert margin > 0
    assert shown["half"].shape == shown["three quarters"].shape
    half, more = (shown[name][:, :margin] for name in ("half", "three quarters"))
    assert (half < 128).any()
    assert not np.array_equal(half, more)


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (StrengthSchedule(epochs=3), {"max_epochs": 2}, "`epochs` must be at most 2, the `max_epochs` of the Trainer"),
        (StrengthSchedule(steps=5), {"max_steps": 4}, "`steps` must be at most 4, the `max_steps` of the Trainer"),
        (StrengthSchedule(steps=9), {"max_epochs": 2}, "`steps` must fit into the 8 steps of the run, got 9"),
        (
            StrengthSchedule(epochs=2),
            {"max_steps": 7, "max_epochs": -1},
            "`epochs` must fit into the 7 steps of the run, got '2 epochs of 4 steps'",
        ),
        (StrengthSchedule(), {"max_epochs": -1, "max_time": "00:00:01:00"}, "`max_epochs` must end the run"),
        (lambda step: 1.5, {}, r"`strength` must lie in \[0, 1\], got 1.5"),
    ],
)
def test_a_curriculum_that_does_not_fit_is_refused_before_the_first_step(schedule, settings, message):
    module = Sees()
    with pytest.raises(ValueError, match=message):
        run(schedule, module, **settings)
    assert not module.seen["train"]


def test_a_trial_run_may_be_shorter():
    notes, *_ = run(StrengthSchedule(0.5, epochs=9), fast_dev_run=True)
    assert notes.seen == [0.5]


@pytest.mark.parametrize(
    ("strength", "policy", "error", "message"),
    [
        (2.0, None, ValueError, "`strength` must lie in"),
        ("strong", None, TypeError, "`strength` must be a number, a schedule or a function"),
        (0.5, Policy(), TypeError, "`policy` must have a method `set_strength`, got 'Policy'"),
    ],
)
def test_bad_arguments(strength, policy, error, message):
    with pytest.raises(error, match=message):
        ViewAugmentation(policy or augment.simclr_views(8), strength=strength)


def test_a_function_must_return_a_number():
    with pytest.raises(TypeError, match="`strength` must return a number, got 'Tensor'"):
        run(lambda step: torch.tensor(0.5))


def test_the_images_of_the_loader_stay():
    images = IMAGES.clone()
    data = DataLoader([(images, LABELS)], batch_size=None, collate_fn=lambda batch: batch)
    run_fit(Sees(), [ViewAugmentation(augment.simclr_views(8), strength=StrengthSchedule())], data)
    assert torch.equal(images, IMAGES)
