"""Every loss with its oracle, as one table that several tests are parametrized over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_contrast import losses
from lightning_contrast.losses import Negatives
from tests.losses import oracles

QUEUE, DIM = 7, 5
QUEUE_GROUPS = (0, -1, 7, 0, 1, 1, 0)


@dataclass(frozen=True)
class Case:
    """One loss: how to call it and its oracle on ``inputs`` row tensors and ``learned`` one-element tensors.

    Args:
        loss: Called with the row tensors, the learned ones, the integer rows and a tile size.
        oracle: Called with the same, without a tile size.
        inputs: Number of row tensors.
        learned: Start values of the learned tensors.
        shared: Number of tensors ``(QUEUE, DIM)`` that are the same on every rank, after the row tensors.
        no_gradient: Row tensors that must receive no gradient.
    """

    loss: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    inputs: int = 2
    learned: tuple[float, ...] = ()
    shared: int = 0
    no_gradient: tuple[int, ...] = ()
    tiled: bool = True
    groups: int = field(default=0)


def _bilinear_weight(x: Tensor) -> Tensor:
    """Return a fixed matrix that is not symmetric, exact in half precision."""
    return ((3 * torch.arange(x.shape[1] ** 2, device=x.device)) % 7 - 3).view(x.shape[1], -1).to(x.dtype) / 4


def _int(x: Tensor) -> list[int]:
    return [int(v) for v in x]


def _f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _temperature(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Pass the learned tensor as the temperature."""
    return lambda *xs, tile_size=None: loss(*xs[:-1], temperature=xs[-1], tile_size=tile_size, **options)


def _number(loss: Callable[..., Tensor], t: float, **options: Any) -> Callable[..., Tensor]:
    """Pass the temperature as a number."""
    return lambda *xs, tile_size=None: loss(*xs, temperature=t, tile_size=tile_size, **options)


def _oracle(oracle: Callable[..., Tensor], t: float, *rest: Any) -> Callable[..., Tensor]:
    return lambda *xs: oracle(*xs, _f64(t), *rest)


def _weighted(weighting: Negatives | str, anchor: Callable[..., Tensor], t: float) -> dict[str, Case]:
    """Return NT-Xent, InfoNCE with a queue, and CLIP with one weighting of negatives."""
    tt = _f64(t)
    name = weighting if isinstance(weighting, str) else weighting.kind
    return {
        f"nt_xent {name}": Case(
            _temperature(losses.nt_xent, weighting=weighting),
            lambda a, b, t: oracles.nt_xent(a, b, t, anchor),
            learned=(t,),
        ),
        f"info_nce {name}": Case(
            _number(losses.info_nce, t, weighting=weighting),
            lambda q, k: oracles.info_nce(q, k, None, tt, anchor),
        ),
        f"info_nce queue {name}": Case(
            _temperature(losses.info_nce, weighting=weighting),
            lambda q, k, n, t: oracles.info_nce(q, k, n, t, anchor),
            shared=1,
            learned=(t,),
        ),
        f"clip {name}": Case(
            lambda a, b, s, tile_size=None: losses.clip_loss(
                a, b, logit_scale=s, weighting=weighting, tile_size=tile_size
            ),
            lambda a, b, s: (
                (oracles.info_nce(a, b, None, 1 / s, anchor) + oracles.info_nce(b, a, None, 1 / s, anchor)) / 2
            ),
            learned=(1 / t,),
        ),
    }


CASES: dict[str, Case] = {
    "nt_xent": Case(_number(losses.nt_xent, 0.1), _oracle(oracles.nt_xent, 0.1)),
    "nt_xent, unbounded": Case(_number(losses.nt_xent, 0.001), _oracle(oracles.nt_xent, 0.001)),
    "nt_xent, learned": Case(_temperature(losses.nt_xent), oracles.nt_xent, learned=(0.2,)),
    "nt_xent, groups": Case(
        lambda a, b, g, tile_size=None: losses.nt_xent(a, b, temperature=0.3, groups=g, tile_size=tile_size),
        lambda a, b, g: oracles.nt_xent(a, b, _f64(0.3), groups=_int(g)),
        groups=1,
    ),
    "info_nce": Case(_number(losses.info_nce, 0.1), lambda q, k: oracles.info_nce(q, k, None, _f64(0.1))),
    "info_nce, learned": Case(
        _temperature(losses.info_nce), lambda q, k, t: oracles.info_nce(q, k, None, t), learned=(0.2,)
    ),
    "info_nce, groups": Case(
        lambda q, k, g, tile_size=None: losses.info_nce(q, k, temperature=0.3, groups=g, tile_size=tile_size),
        lambda q, k, g: oracles.info_nce(q, k, None, _f64(0.3), groups=(_int(g), _int(g))),
        groups=1,
    ),
    "info_nce, queue": Case(_temperature(losses.info_nce), oracles.info_nce, inputs=2, shared=1, learned=(0.2,)),
    "bilinear": Case(
        lambda q, k, tile_size=None: losses.bilinear_loss(q, k, _bilinear_weight(q)),
        lambda q, k: oracles.bilinear(q, k, _bilinear_weight(q)),
        tiled=False,
    ),
    "sup_con": Case(
        lambda a, b, g, tile_size=None: losses.sup_con(a, b, g, temperature=0.1, tile_size=tile_size),
        lambda a, b, g: oracles.sup_con([a, b], _int(g), _f64(0.1)),
        groups=1,
    ),
    "sup_con, one view": Case(
        lambda a, g, tile_size=None: losses.sup_con(a, g, temperature=0.1, tile_size=tile_size),
        lambda a, g: oracles.sup_con([a], _int(g), _f64(0.1)),
        inputs=1,
        groups=1,
    ),
    "sup_con, three views, learned": Case(
        lambda a, b, c, t, g, tile_size=None: losses.sup_con(a, b, c, g, temperature=t, tile_size=tile_size),
        lambda a, b, c, t, g: oracles.sup_con([a, b, c], _int(g), t),
        inputs=3,
        learned=(0.2,),
        groups=1,
    ),
    "sup_con, learned": Case(
        lambda a, b, t, g, tile_size=None: losses.sup_con(
            a, b, g, temperature=t, base_temperature=0.07, tile_size=tile_size
        ),
        lambda a, b, t, g: t / 0.07 * oracles.sup_con([a, b], _int(g), t),
        learned=(0.2,),
        groups=1,
    ),
    "info_nce, queue with groups, learned": Case(
        lambda q, k, n, t, g, tile_size=None: losses.info_nce(
            q, k, n, temperature=t, groups=g, negatives_groups=torch.tensor(QUEUE_GROUPS), tile_size=tile_size
        ),
        lambda q, k, n, t, g: oracles.info_nce(q, k, n, t, groups=(_int(g), QUEUE_GROUPS)),
        shared=1,
        learned=(0.2,),
        groups=1,
    ),
    "clip": Case(
        lambda a, b, s, tile_size=None: losses.clip_loss(a, b, logit_scale=s, tile_size=tile_size),
        oracles.clip,
        learned=(14.0,),
    ),
    "clip, number": Case(
        lambda a, b, tile_size=None: losses.clip_loss(a, b, logit_scale=14.0, tile_size=tile_size),
        lambda a, b: oracles.clip(a, b, _f64(14.0)),
    ),
    "siglip": Case(
        lambda a, b, s, c, tile_size=None: losses.siglip_loss(a, b, logit_scale=s, logit_bias=c, tile_size=tile_size),
        oracles.siglip,
        learned=(10.0, -10.0),
    ),
    "moco_v3": Case(_temperature(losses.moco_v3_loss), oracles.moco_v3, inputs=4, learned=(0.2,), no_gradient=(2, 3)),
    "byol": Case(losses.byol_loss, lambda p, t: 2 + 2 * oracles.negative_cosine(p, t), no_gradient=(1,), tiled=False),
    "negative_cosine": Case(losses.negative_cosine, oracles.negative_cosine, no_gradient=(1,), tiled=False),
    "alignment": Case(losses.alignment, oracles.alignment, tiled=False),
    "alignment, alpha 1": Case(
        partial(losses.alignment, alpha=1.0), partial(oracles.alignment, alpha=1.0), tiled=False
    ),
    "uniformity": Case(losses.uniformity, oracles.uniformity, inputs=1),
    "spectral": Case(partial(losses.spectral_contrastive_loss, mu=3.0), partial(oracles.spectral, mu=3.0), tiled=False),
    "triplet": Case(
        partial(losses.triplet_loss, margin=0.5), partial(oracles.triplet, margin=0.5), inputs=3, tiled=False
    ),
    "margin_contrastive": Case(
        lambda a, b, g: losses.margin_contrastive_loss(a, b, g == 0, margin=3.0),
        lambda a, b, g: oracles.margin_contrastive(a, b, [v == 0 for v in _int(g)], margin=3.0),
        groups=1,
        tiled=False,
    ),
    "decoupled_weighted": Case(
        _number(losses.decoupled_nt_xent, 0.2, sigma=0.4),
        lambda a, b: oracles.decoupled_weighted(a, b, _f64(0.2), 0.4),
    ),
    **_weighted(Negatives("debiased", tau_plus=0.02), oracles.hard(0.02, 0.0), 0.5),
    **_weighted(Negatives("hard", tau_plus=0.05, beta=0.7), oracles.hard(0.05, 0.7), 0.5),
    **_weighted("decoupled", oracles.decoupled, 0.2),
    **_weighted(Negatives("top_k", k=2), oracles.top_k(2), 0.2),
    **_weighted(Negatives("heated", heat=0.6), oracles.heated(0.6), 0.2),
}


def make_inputs(case: Case, rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return row tensors, shared tensors, learned tensors and groups, in the argument order of the case."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(rows, DIM, generator=generator, dtype=dtype) for _ in range(case.inputs)]
    tensors += [torch.randn(QUEUE, DIM, generator=generator, dtype=dtype) for _ in range(case.shared)]
    tensors += [torch.tensor(value, dtype=dtype) for value in case.learned]
    tensors += [torch.randint(-1, 2, (rows,), generator=generator) for _ in range(case.groups)]
    return tensors


def value_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor | None]:
    """Return the loss and the gradient of every floating tensor, None if it has none."""
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    loss = function(*leaves, **options)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.is_floating_point())]
