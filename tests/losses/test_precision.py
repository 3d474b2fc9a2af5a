"""Autocast, 16-bit inputs, extreme numbers, host reads, compilation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_contrast import losses
from lightning_contrast.testing import HostSyncs
from tests.losses.cases import CASES, make_inputs, value_and_gradients
from tests.tolerances import NETWORK, assert_same_bits, f32


@pytest.mark.parametrize("name", CASES)
def test_no_host_read_forward_and_backward(name: str) -> None:
    case = CASES[name]
    tensors = make_inputs(case, 5, dtype=torch.float32)
    with HostSyncs() as reads:
        value_and_gradients(case.loss, tensors)
    assert reads.places == []


def test_the_counter_of_host_reads_counts() -> None:
    with HostSyncs() as reads:
        bool(torch.ones(1).sum() > 0)
        torch.ones(2).nonzero()
    assert len(reads.places) >= 2


@pytest.mark.parametrize("name", CASES)
def test_autocast_gives_the_float32_value(name: str) -> None:
    case = CASES[name]
    tensors = make_inputs(case, 6, dtype=torch.float32)
    expected = value_and_gradients(case.loss, tensors)

    def loss(*arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.loss(*arguments)

    found = value_and_gradients(loss, tensors)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is None or mine.dtype == torch.float32
        assert_same_bits(mine, theirs, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_inputs_are_raised_to_float32(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in make_inputs(case, 6, dtype=torch.float32)]
    raised = [t.float() if t.is_floating_point() else t for t in tensors]
    found = case.loss(*tensors)
    assert found.dtype == torch.float32
    assert_same_bits(found, case.loss(*raised), name)


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 1 / 60, 1 / 61, 0.07, 1.0, 100.0])
def test_float32_follows_float64_at_any_temperature(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, queue = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 40, 30))
    learned = torch.tensor(temperature)
    for given in (temperature, learned):
        for call in (
            lambda x, y, q, t=given: losses.nt_xent(x, y, temperature=t),
            lambda x, y, q, t=given: losses.info_nce(x, y, q, temperature=t),
            lambda x, y, q, t=given: losses.clip_loss(x, y, logit_scale=1 / t),
            lambda x, y, q, t=given: losses.siglip_loss(x, y, logit_scale=1 / t, logit_bias=-10.0),
        ):
            wide = value_and_gradients(call, [a, b, queue])
            narrow = value_and_gradients(call, [a.float(), b.float(), queue.float()])
            assert wide[0].isfinite()
            for mine, theirs in zip(narrow[:3], wide[:3], strict=True):
                size = float(theirs.abs().max())
                # rounding of a similarity by 1e-7 is 1e-7 / T in the logit
                torch.testing.assert_close(
                    mine.double(), theirs, **f32(NETWORK, size=0.01 * size * (1 + 1 / temperature))
                )


class ProductPrecisions(TorchDispatchMode):
    """Records the precision that matrix products of float32 are allowed to have, whenever there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in {"mm", "addmm", "addmm_", "bmm", "mv", "dot"}:
            self.found.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _fast_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].tiled])
@pytest.mark.usefixtures("_fast_products")
def test_matrix_products_are_in_full_precision(name: str) -> None:
    """Logits are not rounded to TF32 or bfloat16, forward and backward, and the setting is the user's afterwards."""
    with ProductPrecisions() as products:
        value_and_gradients(CASES[name].loss, make_inputs(CASES[name], 5, dtype=torch.float32))
    assert products.found == {("ieee", "ieee")}
    assert torch.get_float32_matmul_precision() == "medium"


def test_zero_rows_and_equal_rows_are_finite() -> None:
    z = torch.zeros(4, 3)
    same = torch.ones(4, dtype=torch.bool)
    for found in (
        value_and_gradients(lambda a, b: losses.nt_xent(a, b, temperature=0.1), [z, z]),
        value_and_gradients(lambda a, b: losses.margin_contrastive_loss(a, b, same, margin=1.0), [z, z]),
        value_and_gradients(lambda a, b: losses.alignment(a, b, alpha=0.5), [z + 1, z + 1]),
        value_and_gradients(lambda a, b: losses.spectral_contrastive_loss(a, b, mu=1.0), [z, z]),
        value_and_gradients(lambda a: losses.uniformity(a), [z + 1]),
    ):
        assert all(torch.isfinite(value).all() for value in found)


def test_a_loss_inside_a_compiled_function() -> None:
    def step(a: Tensor, b: Tensor) -> Tensor:
        return losses.nt_xent(a * 2, b, temperature=0.1) + a.sum() * 0

    a, b = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager")
    loss = compiled(a, b)
    found = torch.autograd.grad(loss, [a, b])
    expected = torch.autograd.grad(step(a, b), [a, b])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_inputs_are_left_as_they_are() -> None:
    for name, case in CASES.items():
        tensors = make_inputs(case, 5)
        copies = [t.clone() for t in tensors]
        value_and_gradients(case.loss, tensors)
        assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True)), name


def test_backward_twice_through_a_kept_graph() -> None:
    a, b = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    loss = losses.nt_xent(a, b, temperature=0.1)
    first = torch.autograd.grad(loss, a, retain_graph=True)[0]
    assert_same_bits(torch.autograd.grad(loss, a)[0], first)
