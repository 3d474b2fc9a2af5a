"""Go on from a checkpoint with another number of processes: the same state, schedules at the same share of the run."""

import lightning as L
import pytest
import torch

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.resuming import extend_training
from lightning_contrast.testing import run_processes
from tests.methods.cases import CASES, make
from tests.methods.test_contract import rows_of, state, step_batch
from tests.rank_runs import batch_of, fit, on_ranks, shares
from tests.tolerances import FORMULA, f32, near64

NAMES = ("MoCo", "NNCLR", "NPID", "SwAV", "DINO", "DINOv2 centres")  # queues, banks, centers, momentum networks


class Keep(L.Callback):
    """Keeps what the module holds when the first step begins, and saves a checkpoint after some epochs."""

    def __init__(self, path=None, epochs=1):
        self.path, self.epochs = path, epochs

    def on_train_start(self, trainer, pl_module):
        self.start = state(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path is not None and trainer.current_epoch == self.epochs - 1:
            trainer.save_checkpoint(self.path)


def epochs_of(name, rank=None, *, save=None, resume=None):
    """Train two epochs of two steps, or the second of them; return the state at the start and at the end."""
    torch.manual_seed(5)
    module, keep = make(name, norm=False), Keep(save)
    if resume is not None:
        for parameter in module.parameters():
            parameter.data.add_(1.0)  # what is not loaded shows
    share = rows_of(step_batch(CASES[name]), slice(None) if rank is None else shares([4, 4])[rank])
    settings = {"precision": "32-true"} | ({} if rank is None else on_ranks(2))  # Lightning loads before it casts
    fit(module, [share] * 2, callbacks=[keep], ckpt_path=resume, **settings)
    return keep.start, state(module)


def as_numbers(values):
    """Return the state with the bits of queues and centers viewed as floats."""
    return {key: value.view(torch.float32) if key.endswith("bits") else value for key, value in values.items()}


@pytest.mark.dist
def test_two_processes_and_one_go_on_from_each_others_checkpoints(tmp_path):
    """After the load the state is the checkpoint's on every rank; at the end it is that of a run without a stop."""
    alone = {name: epochs_of(name, save=tmp_path / f"one {name}.ckpt")[1] for name in NAMES}

    def work(rank):
        for name in NAMES:
            epochs_of(name, rank, save=tmp_path / f"two {name}.ckpt")
        return {name: epochs_of(name, rank, resume=tmp_path / f"one {name}.ckpt") for name in NAMES}

    ranks = run_processes(work, 2, init=False, timeout=300)
    for name in NAMES:
        resumed = epochs_of(name, resume=tmp_path / f"two {name}.ckpt")
        for source, (start, end) in [("two", resumed), *(("one", found[name]) for found in ranks)]:
            saved = torch.load(tmp_path / f"{source} {name}.ckpt", weights_only=True)["state_dict"]
            assert saved.keys() == start.keys()
            assert all(torch.equal(saved[key], value) for key, value in start.items()), name
            expected = as_numbers(alone[name])
            for key, value in as_numbers(end).items():
                torch.testing.assert_close(value, expected[key], **f32(FORMULA), msg=lambda m, n=name: f"{n}: {m}")


class Schedules(L.Callback):
    """Notes what the schedules give in each step."""

    def __init__(self):
        self.rates, self.momenta, self.decays = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.decays.append(trainer.optimizers[0].param_groups[0]["weight_decay"])
        update = next(c for c in trainer.callbacks if isinstance(c, MomentumUpdate))
        self.momenta.append(update._momentum(trainer, pl_module, trainer.global_step - 1))


def resumed(tmp_path, steps_before, steps_after, *, extension=None, max_epochs=4):
    """Train two of four epochs, and the rest in epochs of another length; return the module, schedules and warnings."""
    path, module, seen = tmp_path / "way.ckpt", make("DINO", norm=False, warmup_epochs=1), Schedules()
    batch = batch_of("DINO", slice(0, 4))
    if not path.exists():
        before = make("DINO", norm=False, warmup_epochs=1)
        fit(before, [batch] * steps_before, callbacks=[Keep(path, epochs=2)], max_epochs=4)
    callbacks = [seen] if extension is None else [extension, seen]
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_contrast.runtime.learning_rate.rank_zero_warn", said.append)
        fit(module, [batch] * steps_after, callbacks=callbacks, ckpt_path=path, max_epochs=max_epochs)
    return module, seen, said


@pytest.mark.parametrize(("steps_before", "steps_after"), [(4, 8), (8, 4)])
def test_schedules_go_on_from_the_same_share_of_the_run(tmp_path, steps_before, steps_after):
    """Half the processes with the same batch each make twice the steps of an epoch."""
    module, seen, said = resumed(tmp_path, steps_before, steps_after)
    total, update = 4 * steps_after, MomentumUpdate(module.schedules.momentum)
    assert len(seen.rates) == 2 * steps_after
    assert module.trainer.global_step == 2 * (steps_before + steps_after)
    for index, (momentum, decay) in enumerate(zip(seen.momenta, seen.decays, strict=True)):
        place = 2 * steps_after + index  # as if the epochs before had been as long
        expected = lc.optim.weight_decay_cosine(place, total, module.weight_decay, module.schedules.final_weight_decay)
        assert decay == near64(expected)
        assert momentum == near64(update.momentum_at(place, total))
        if index:  # the rate of the first step was in the checkpoint
            assert seen.rates[index] == near64(0.05 * module.lr_factor(place, steps_after, total))
    kept = 0.05 * module.lr_factor(2 * steps_before, steps_before, 4 * steps_before)
    assert seen.rates[0] == near64(kept)
    assert abs(seen.rates[1] - seen.rates[0]) < 0.1 * 0.05 * 8 / steps_after
    (words,) = said
    assert f"An epoch has {steps_after} optimizer steps; before the checkpoint it had {steps_before}." in words
    assert f"is about {steps_before / steps_after:g} times as large" in words
    assert "peak learning rate remains the checkpoint's 0.05" in words


@pytest.mark.slow
def test_a_second_stop_resumes_exactly(tmp_path):
    """After a change of the epochs' length the schedules are elsewhere than the steps; a checkpoint knows where."""
    module, whole, said = resumed(tmp_path, 4, 6)
    assert len(said) == 1
    again, batch = make("DINO", norm=False, warmup_epochs=1), batch_of("DINO", slice(0, 4))
    saving = make("DINO", norm=False, warmup_epochs=1)
    second = tmp_path / "second.ckpt"
    callbacks = [Keep(second, epochs=3)]
    fit(saving, [batch] * 6, callbacks=callbacks, ckpt_path=tmp_path / "way.ckpt", max_epochs=4)
    seen, said = Schedules(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_contrast.runtime.learning_rate.rank_zero_warn", said.append)
        fit(again, [batch] * 6, callbacks=[seen], ckpt_path=second, max_epochs=4)
    assert not said
    assert (seen.rates, seen.momenta, seen.decays) == (whole.rates[6:], whole.momenta[6:], whole.decays[6:])
    assert again.trainer.global_step == module.trainer.global_step == 2 * 4 + 2 * 6


def test_the_same_epochs_need_no_words_and_change_nothing(tmp_path):
    _, seen, said = resumed(tmp_path, 4, 4)
    whole = Schedules()
    fit(make("DINO", norm=False, warmup_epochs=1), [batch_of("DINO", slice(0, 4))] * 4, callbacks=[whole], max_epochs=4)
    assert not said
    assert (seen.rates, seen.momenta, seen.decays) == (whole.rates[8:], whole.momenta[8:], whole.decays[8:])


@pytest.mark.slow
def test_an_extension_with_epochs_of_another_length(tmp_path):
    """Two of four epochs of 4 steps are done; the other two are stretched over six epochs of 8 steps."""
    resumed(tmp_path, 4, 4)
    extension = extend_training(tmp_path / "way.ckpt", 4, planned_epochs=4)
    module, seen, said = resumed(tmp_path, 4, 8, extension=extension, max_epochs=8)
    assert len(said) == 1
    assert len(seen.rates) == 6 * 8
    for index, decay in enumerate(seen.decays):
        place = 2 * 8 + index * (2 * 8) / (6 * 8)  # of 4 epochs of 8 steps
        expected = lc.optim.weight_decay_cosine(place, 4 * 8, module.weight_decay, module.schedules.final_weight_decay)
        assert decay == near64(expected)
    assert all(b <= a for a, b in zip(seen.rates, seen.rates[1:], strict=False))
