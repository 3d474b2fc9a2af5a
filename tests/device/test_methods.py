"""Every method's fit on the pretended device: forward, backward, optimizer, teachers, centers and queues."""

import pytest
import torch

import lightning_contrast as lc
from tests.device.documented import LIGHTNING, METHODS
from tests.device.pretended import DeviceFault, PretendedDevice, in_own_process
from tests.device.runs import loader, trainer
from tests.methods.cases import CASES, TinyBackbone, fill_queue, make


@pytest.mark.parametrize("name", CASES)
@in_own_process
@pytest.mark.slow
def test_a_fit_reads_nothing_and_mixes_nothing(name, tmp_path):
    case = CASES[name]
    before = fill_queue(make(name)).state_dict()
    with PretendedDevice(LIGHTNING | METHODS.get(name.split()[0], {})):
        module = fill_queue(make(name))
        trainer(tmp_path).fit(module, loader(case.views, case.indices))
    state = module.state_dict()
    changed = [name for name, value in state.items() if not torch.equal(getattr(value, "host", value), before[name])]
    assert len(changed) > len(list(module.parameters())) / 2, "it did not train"


class Planted(lc.SimCLR):
    """SimCLR with a fault."""

    fault = ""

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        x = torch.ones(4, device=self.device, requires_grad=True) * 1
        if self.fault == "item in the step":
            out["features"].sum().item()
        elif self.fault == "constant in the step":
            out["loss"] = out["loss"] + (x * torch.ones(4)).sum()
        elif self.fault == "item in backward":
            x.register_hook(lambda gradient: gradient * gradient.sum().item())
        elif self.fault == "constant in backward":
            x.register_hook(lambda gradient: gradient * torch.ones(4))
        out["loss"] = out["loss"] + x.sum()
        return out

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        weight = next(self.parameters())
        if self.fault == "item in the optimizer":
            weight.data.mul_(weight.norm().item())
        elif self.fault == "constant in the optimizer":
            weight.data.mul_(torch.ones(weight.shape))


@pytest.mark.parametrize("what", ["item", "constant"])
@pytest.mark.parametrize("place", ["the step", "backward", "the optimizer"])
@in_own_process
def test_a_planted_fault_in_a_fit_is_found(what, place, tmp_path):
    module = Planted(TinyBackbone(), optimizer="sgd", lr=0.1, warmup_epochs=0)
    module.fault = f"{what} in {place}"
    kind = "_local_scalar_dense" if what == "item" else "of the host"
    with pytest.raises(DeviceFault, match=f"test_methods.py.*{kind}.*6 times"), PretendedDevice(LIGHTNING):
        trainer(tmp_path).fit(module, loader(2))
