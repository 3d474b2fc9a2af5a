"""Every method's schedules along six kinds of run: one step counter, one length, compared with the formulas."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.callbacks import MomentumUpdate
from lightning_contrast.methods.distillation import DistillationModule
from lightning_contrast.nn.ema_sharded import Averager
from lightning_contrast.optim import momentum_schedule, scaled_lr
from lightning_contrast.optim.schedules import warmed_up
from tests.methods.cases import CASES, make
from tests.methods.test_contract import step_batch
from tests.tolerances import near64

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*Consider setting")
IMAGES = 32
BATCH = 8
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}
NAMES = list({type(make(name)): name for name in reversed(CASES)}.values())[::-1]  # one case per method


class Views(L.LightningDataModule):
    """Batches of views; the batch size is an attribute that a tuner can change."""

    def __init__(self, name, batch_size=BATCH):
        super().__init__()
        self.batch_size = batch_size
        views, *rest = step_batch(CASES[name], size=IMAGES)
        self.items = [([v[i] for v in views], *(r[i] % 8 for r in rest)) for i in range(IMAGES)]

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(self.items[:8], batch_size=8)  # a tuner wants one


class Schedules(L.Callback):
    """Records what each optimizer step really used."""

    def __init__(self, monkeypatch):
        self.clear()
        update = Averager.update

        def record(averager, pairs, root, momentum):
            self.momenta.append(momentum)
            update(averager, pairs, root, momentum)

        monkeypatch.setattr(Averager, "update", record)

    def clear(self):
        self.rates, self.decays, self.momenta, self.temperatures, self.teacher, self.epochs = [], [], [], [], [], []

    def on_train_start(self, trainer, pl_module):
        self.clear()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.epochs.append(trainer.current_epoch)
        if isinstance(pl_module, DistillationModule):
            self.teacher.append(pl_module.teacher_temperature)
        if isinstance(getattr(pl_module, "temperature", None), lc.nn.ScheduledTemperature):
            self.temperatures.append(float(trainer.callback_metrics["train/temperature"]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(self.decays) < len(self.rates):
            self.decays.append([group["weight_decay"] for group in trainer.optimizers[0].param_groups])


def module_of(name, lr=None):
    settings = {"warmup_epochs": 1, "lr": lr}
    if name in ("SimCLR", "MoCo", "NNCLR", "SupCon", "MoCHi", "MoCoV3"):
        settings["temperature"] = lc.nn.ScheduledTemperature(0.5, 0.1)
    return make(name, **settings)


def check(module, seen, *, total, warmup, batch, first=0, lr=None, steps_of=None):
    """Compare the recorded steps ``first``, ... with the formulas of a run of ``total`` steps."""
    main = scaled_lr(module.base_lr, batch, module.lr_rule) if lr is None else lr
    updates = [c for c in module.default_callbacks() if isinstance(c, MomentumUpdate)]
    groups = module.trainer.optimizers[0].param_groups
    assert len(seen.rates) == total - first
    for index, (rates, decays) in enumerate(zip(seen.rates, seen.decays, strict=True)):
        step = first + index
        factor = module.lr_factor(step, warmup, total)
        options = [(owner, getattr(owner, "group_options", {})) for owner in module.modules()]
        own = {p: given["lr"] for owner, given in options if "lr" in given for p in owner.parameters()}
        for group, rate, decay in zip(groups, rates, decays, strict=True):
            peak = own.get(next(iter(group["params"]), None), main)  # a learned temperature has a rate of its own
            expected = 1 if group.get("fixed_lr") else factor * group.get("lr_multiplier", 1)
            assert rate == near64(peak * expected), step
            if group.get("scheduled_decay"):
                assert decay == near64(module.weight_decay_at(step, total)), step
        for update in updates:
            kind = "constant" if update.schedule == "constant" else update.schedule
            expected = momentum_schedule(step, total, update.start, update.end, kind)
            assert seen.momenta[index] == near64(expected), step
        if seen.temperatures:
            assert seen.temperatures[index] == pytest.approx(lc.nn.ScheduledTemperature(0.5, 0.1)(step, total)), step
        if seen.teacher:
            schedules, by_step = module.schedules, module.warms_up_by_step
            epochs = schedules.warmup_teacher_temperature_epochs
            of_warmup = steps_of(epochs) if steps_of else epochs * warmup
            now, length = (step, of_warmup) if by_step else (seen.epochs[index], epochs)
            start, end = schedules.warmup_teacher_temperature, schedules.teacher_temperature
            assert seen.teacher[index] == near64(warmed_up(now, start, end, length)), step
    assert len(seen.momenta) == (len(seen.rates) if updates else 0)


def fit(module, data, seen, *callbacks, ckpt_path=None, **settings):
    trainer = L.Trainer(**(QUIET | {"max_epochs": 3} | settings), callbacks=[seen, *callbacks])
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return trainer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_schedules(name, tmp_path, monkeypatch):
    seen = Schedules(monkeypatch)

    module = module_of(name)  # plain, then a second fit
    trainer = fit(module, Views(name), seen)
    check(module, seen, total=12, warmup=4, batch=BATCH)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, Views(name))
    check(module, seen, total=20, warmup=4, batch=BATCH, first=12)

    module = module_of(name)  # resume with a longer run and with twice the accumulation
    fit(module, Views(name), seen, ckpt_path=tmp_path / "end.ckpt", max_epochs=4)
    check(module, seen, total=16, warmup=4, batch=BATCH, first=12)
    words = r"An epoch has 2 optimizer steps; before the checkpoint it had 4\. .* follows the global batch"
    settings = {"max_epochs": 5, "accumulate_grad_batches": 2}
    with pytest.warns(UserWarning, match=words):
        fit(module_of(name), Views(name), seen, ckpt_path=tmp_path / "end.ckpt", **settings)
    check_rates = module_of(name)
    peak = scaled_lr(check_rates.base_lr, 2 * BATCH, check_rates.lr_rule)
    assert len(seen.rates) == 4
    if not hasattr(check_rates, "schedules"):  # whose last rate is absolute
        assert [rates[0] for rates in seen.rates] == near64([peak * module.lr_factor(k, 2, 10) for k in range(6, 10)])

    module = module_of(name)
    fit(module, Views(name), seen, accumulate_grad_batches=2)
    check(module, seen, total=6, warmup=2, batch=2 * BATCH)

    module = module_of(name)
    fit(module, Views(name), seen, GradientAccumulationScheduler({0: 2}))
    check(module, seen, total=6, warmup=2, batch=2 * BATCH)
    module = module_of(name, lr=0.05)
    fit(module, Views(name), seen, GradientAccumulationScheduler({0: 1, 2: 2}))
    check(module, seen, total=10, warmup=4, batch=None, lr=0.05, steps_of=lambda epochs: 8 + 2 * (epochs - 2))

    module, data = module_of(name), Views(name, batch_size=4)
    finder = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=4, max_trials=2)
    fit(module, data, seen, finder, default_root_dir=tmp_path)
    assert data.batch_size == 8
    check(module, seen, total=12, warmup=4, batch=8)
