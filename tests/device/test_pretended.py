"""The pretended device itself: it computes what the CPU computes, and each planted fault is found."""

import pytest
import torch
from torch import nn

from tests.device.pretended import DeviceFault, OnDevice, PretendedDevice, in_own_process


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(36 * 4, 5))


@in_own_process
def test_training_gives_what_the_cpu_gives():
    images, targets = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    ours, theirs = _network(), _network()
    with PretendedDevice() as pretended:
        ours.to(pretended.device)
        for net, x, y in ((ours, images.to(pretended.device), targets.to(pretended.device)), (theirs, images, targets)):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
        assert loss.device.type == "cpu"
    assert isinstance(next(ours.parameters()), OnDevice)
    assert next(ours.parameters()).device.type == "pretend"
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a.host, b), name


FAULTS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.empty(4).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "assigned mask": lambda x: x.clone().index_put_((x > 0,), x.sum()),
    "unique": lambda x: x.unique(),
    "one_hot": lambda x: nn.functional.one_hot(x.long()),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(x.diag()),
    "svdvals": lambda x: torch.linalg.svdvals(x.diag()),
    "range": lambda x: list(range(x.sum().long())),
    "constant": lambda x: x + torch.ones(4),
    "matrix of the host": lambda x: x @ torch.ones(4, 2),
    "cat": lambda x: torch.cat([x, torch.ones(1)]),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "where with the host": lambda x: torch.where(torch.ones(4) > 0, x, x),
    "gather": lambda x: x.gather(0, torch.tensor([0])),
    "indexed tensor of the host": lambda x: torch.ones(4)[x.long()],
    "stack": lambda x: torch.stack([x.sum(), torch.ones(())]),
}


@pytest.mark.parametrize("fault", FAULTS)
@in_own_process
def test_a_planted_fault_is_found(fault):
    with pytest.raises(DeviceFault, match=r"test_pretended.py:\d+ in <lambda>"), PretendedDevice() as pretended:
        FAULTS[fault](torch.ones(4).to(pretended.device))
    assert len(pretended.faults) == 1


@in_own_process
def test_what_is_fine_on_an_accelerator_is_fine():
    with PretendedDevice() as pretended:
        x = torch.ones(4, device=pretended.device, requires_grad=True)
        y = x * torch.tensor(2.0) + 1 + torch.rand(4).to(x) + torch.tensor([1.0, 2, 3, 4], device=x.device)
        y = torch.where(y > 0, y, torch.tensor(0.0)) + torch.rand(4, device=x.device).clamp(min=0.1)
        y = y[torch.arange(4, device=x.device)].masked_fill(y > 3, 0.0)
        y[1:3] = 7
        y.sum().backward()
        assert x.grad.device == x.device
        assert torch.rand(4).sum().item() > 0  # of the host
        torch.zeros(4, device=x.device).copy_(torch.ones(4))
        assert all(isinstance(t, OnDevice) for t in (y, x.grad, x.new_zeros(2), torch.eye(3, device=x.device)))


class _Reads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * gradient.sum().item()


class _Meets(_Reads):
    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones(4)


@pytest.mark.parametrize("function", [_Reads, _Meets])
@in_own_process
def test_a_fault_in_backward_is_found(function):
    with pytest.raises(DeviceFault, match="in backward"), PretendedDevice() as pretended:  # noqa: PT012
        x = torch.ones(4, device=pretended.device, requires_grad=True)
        loss = function.apply(x).sum()
        assert not pretended.faults
        loss.backward()


class _BadOptimizer(torch.optim.SGD):
    constant = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                norm = torch.ones(4) if self.constant else parameter.grad.norm().item()
                parameter.sub_(parameter.grad * norm)


@pytest.mark.parametrize("constant", [False, True])
@in_own_process
def test_a_fault_in_an_optimizer_is_found(constant):
    with pytest.raises(DeviceFault, match="in step"), PretendedDevice() as pretended:  # noqa: PT012
        x = nn.Parameter(torch.ones(4, device=pretended.device))
        optimizer = _BadOptimizer([x], lr=0.1)
        optimizer.constant = constant
        x.sum().backward()
        assert not pretended.faults
        optimizer.step()


def _documented(x):
    return x.item()


@in_own_process
def test_a_documented_read_is_let_through_as_often_as_documented():
    place = "device/test_pretended.py:_documented"
    pretended = PretendedDevice({place: (1, "a reason"), "nowhere.py:f": (9, "")})
    with pytest.raises(DeviceFault, match=r"_documented: .*\(2 times\)"), pretended:
        assert [_documented(torch.ones(1, device=pretended.device)) for _ in range(3)] == [1, 1, 1]
    assert pretended.used == {place: 1}


def _meets(x):
    return x + torch.ones(3)


@in_own_process
def test_reads_and_meetings_are_documented_apart():
    place = "device/test_pretended.py:_meets"
    with PretendedDevice({f"meets {place}": (1, "")}) as pretended:
        _meets(torch.ones(3, device=pretended.device))
    with pytest.raises(DeviceFault, match="of the host"), PretendedDevice({place: (1, "")}) as pretended:
        _meets(torch.ones(3, device=pretended.device))
