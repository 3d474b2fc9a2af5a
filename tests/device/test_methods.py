"""Every method's fit on the pretended device: forward, backward, optimizer, teachers, centers and queues."""

import lightning as L
import pytest
import torch

from tests.device.documented import LIGHTNING, METHODS
from tests.device.pretended import OnDevice, PretendedDevice, in_own_process
from tests.device.runs import loader, trainer
from tests.methods.cases import CASES, fill_queue, make


@pytest.mark.parametrize("name", CASES)
@in_own_process
def test_a_fit_reads_nothing_and_mixes_nothing(name, tmp_path):
    case = CASES[name]
    before = fill_queue(make(name)).state_dict()
    with PretendedDevice(LIGHTNING | METHODS) as pretended:
        module = fill_queue(make(name))
        trainer(tmp_path).fit(module, loader(case.views, case.indices))
    state = module.state_dict()
    changed = [name for name, value in state.items() if not torch.equal(getattr(value, "host", value), before[name])]
    assert len(changed) > len(list(module.parameters())) / 2, "it did not train"
