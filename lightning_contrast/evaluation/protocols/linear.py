"""Linear classifiers trained by SGD in published protocols, and DINOv2's grid of heads trained in one pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_choice, check_positive, fail, require
from lightning_contrast.evaluation.protocols.inputs import Labeled, Split, accuracy, held_out, split
from lightning_contrast.optim import LARS, step_decay, warmup_cosine
from lightning_contrast.seeding import derived_seed

GRID_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates of DINOv2's grid, for a batch of 256."""
_EVALUATED = 8192  # rows per product at the end
_MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearProtocol:
    """Hyper-parameters of a linear probe.

    Attributes:
        lr: Learning rate; for a batch of 256 if ``scaled``.
        scaled: Multiply it by batch / 256.
        epochs: Passes over the training rows.
        batch_size: Rows per step over all GPUs of the paper.
        weight_decay: L2 penalty.
        nesterov: Use Nesterov momentum; momentum is 0.9 in all protocols.
        steps: Shares of the run after which the rate is multiplied by ``factor``; empty is a cosine to 0.
        factor: Of ``steps``.
        warmup: Share of the run with a linear warm-up.
        per_epoch: Change the rate per epoch and not per step.
        init: Standard deviation of the weights at the start; 0 is zeros.
        normalize: Put a BatchNorm without affine parameters before the layer.
        optimizer: "sgd" or "lars".
        source: Where the numbers are from.
    """

    lr: float
    scaled: bool = True
    epochs: int = 100
    batch_size: int = 256
    weight_decay: float = 0.0
    nesterov: bool = False
    steps: tuple[float, ...] = ()
    factor: float = 0.1
    warmup: float = 0.0
    per_epoch: bool = False
    init: float = 0.01
    normalize: bool = False
    optimizer: Literal["sgd", "lars"] = "sgd"
    source: str = ""


_SIMCLR = LinearProtocol(
    0.1, epochs=90, batch_size=4096, weight_decay=1e-6, nesterov=True, source="https://arxiv.org/abs/2002.05709, B.6"
)
_MOCO = LinearProtocol(30.0, scaled=False, steps=(0.6, 0.8), source="https://arxiv.org/abs/1911.05722, section 4.1")
LINEAR_PROTOCOLS: dict[str, LinearProtocol] = {
    "simclr": _SIMCLR,
    "simclr_cifar": replace(_SIMCLR, epochs=100, batch_size=512, weight_decay=0.0, init=0.0),
    "moco": _MOCO,
    "moco_v3": LinearProtocol(
        0.1, epochs=90, batch_size=1024, per_epoch=True, source="https://arxiv.org/abs/2104.02057"
    ),
    "byol": LinearProtocol(
        0.2, epochs=80, batch_size=1024, nesterov=True, source="https://arxiv.org/abs/2006.07733, C.1"
    ),
    "swav": LinearProtocol(0.3, scaled=False, weight_decay=1e-6, source="https://arxiv.org/abs/2006.09882, A.4"),
    "barlow_twins": LinearProtocol(0.3, scaled=False, weight_decay=1e-6, source="https://arxiv.org/abs/2103.03230"),
    "vicreg": LinearProtocol(0.02, scaled=False, weight_decay=1e-6, source="https://arxiv.org/abs/2105.04906"),
    "supcon": LinearProtocol(
        *(5.0, False),
        batch_size=512,
        steps=(0.6, 0.75, 0.9),
        factor=0.2,
        source="https://arxiv.org/abs/2004.11362, CIFAR",
    ),
    "dino": LinearProtocol(0.001, batch_size=1024, source="https://arxiv.org/abs/2104.14294, F.2"),
    "mae": LinearProtocol(
        0.1,
        epochs=90,
        batch_size=16384,
        warmup=1 / 9,
        normalize=True,
        optimizer="lars",
        source="https://arxiv.org/abs/2111.06377, A.1",
    ),
}
"""Published linear probes by name, as `linear_probe` trains them on frozen features."""


class ProbeResult(NamedTuple):
    """What a probe gives.

    Attributes:
        top1: Accuracy on the labeled test rows, in 0..1.
        logits: Logits of the labeled test rows, ``(M, C)``, float32.
        labels: Their classes ``(M,)``.
        settings: What was used and chosen.
    """

    top1: float
    logits: Tensor
    labels: Tensor
    settings: dict[str, Any]


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    protocol: str | LinearProtocol = "simclr",
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Train a linear classifier on frozen features by SGD, in a published protocol.

    Differs from the papers: features are computed once, without the random crops and flips that most of them use in
    training, which costs 0.5 to 1.5 points on ImageNet; and a batch is at most the number of rows, with the learning
    rate of that batch where the protocol scales it.

    Args:
        train: Features ``(N, F)``, floating; on the device of the training.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are left out.
        test: Features ``(M, F)``.
        test_labels: Classes ``(M,)``.
        protocol: A name of `LINEAR_PROTOCOLS`, or hyper-parameters of your own.
        epochs: Passes over the training rows, >= 1; None is the protocol's.
        batch_size: Rows per step, >= 1; None is the protocol's.
        seed: Seed of weights and order, >= 0.

    Returns:
        Accuracy, logits ``(M, C)`` and settings; C is the largest class + 1.

    Raises:
        ValueError: If a name or number is out of range, shapes do not match, or there is one class only.

    Example:
        >>> x = torch.eye(2).repeat(8, 1)
        >>> y = torch.arange(16) % 2
        >>> linear_probe(x, y, x, y, protocol="moco", epochs=5).top1
        1.0
    """
    given = split(train, train_labels, test, test_labels)
    if isinstance(protocol, str):
        check_choice("protocol", protocol, LINEAR_PROTOCOLS)
        protocol = LINEAR_PROTOCOLS[protocol]
    used = _with(protocol, epochs, batch_size, len(given.train.labels))
    rate = used.lr * used.batch_size / 256 if used.scaled else used.lr
    heads = Heads({"": given.train.features}, [("", rate)], given.num_classes, used, seed)
    heads.fit({"": given.train.features}, given.train.labels)
    logits = heads.logits({"": given.test.features})[0]
    settings = {"lr": rate, "epochs": used.epochs, "batch_size": used.batch_size, "source": used.source}
    return ProbeResult(accuracy(logits, given.test.labels), logits, given.test.labels, settings)


def linear_grid(
    train: Tensor | Mapping[str, Tensor],
    train_labels: Tensor,
    test: Tensor | Mapping[str, Tensor],
    test_labels: Tensor,
    *,
    rates: Sequence[float] = GRID_RATES,
    steps: int = 12_500,
    batch_size: int = 1024,
    validation_share: float = 0.1,
    seed: int = 0,
) -> ProbeResult:
    """Train a grid of linear heads in one pass, and report the one that is best on held-out training rows.

    The linear evaluation of DINOv2 (https://arxiv.org/abs/2304.07193, B.3): each learning rate, and each kind of
    features, has its own head; all see the same batches. Differs from it: the head is chosen on a part of the training
    set and not on the set that is reported.

    Args:
        train: Features ``(N, F)``, or several kinds by name, such as the last and the last four blocks, with or without
            the mean of the patches.
        train_labels: Classes ``(N,)``, integers; -1 for unlabeled rows.
        test: Features ``(M, F)``, or the same kinds.
        test_labels: Classes ``(M,)``.
        rates: Learning rates for a batch of 256, each > 0; scaled with the batch.
        steps: Steps of SGD, >= 1; 12,500 in the paper.
        batch_size: Rows per step, at most the number of rows.
        validation_share: Share of the training rows of each class that chooses the head, in (0, 1).
        seed: Seed of split, weights and order, >= 0.

    Returns:
        As `linear_probe`; the settings name the rate and the features, and the validation accuracy of all heads.

    Raises:
        ValueError: As for `linear_probe`, or if the kinds of features differ.
    """
    kinds = {"features": train} if isinstance(train, Tensor) else dict(train)
    others = {"features": test} if isinstance(test, Tensor) else dict(test)
    if not kinds or kinds.keys() != others.keys():
        fail("test", f"have the kinds of features {sorted(kinds)}", sorted(others), "Give the same kinds for both")
    for rate in rates:
        check_positive("rates", rate)
    check_at_least("steps", steps, 1)
    parts = {name: split(kinds[name], train_labels, others[name], test_labels) for name in kinds}
    first: Split = next(iter(parts.values()))
    stay, out = held_out(first.train.labels, validation_share, seed)
    epochs = -(-steps // max(1, -(-len(stay) // min(batch_size, len(stay)))))
    used = _with(LinearProtocol(0.1), epochs, batch_size, len(stay))
    learned = {name: part.train.features[stay] for name, part in parts.items()}
    grid = [(name, rate * used.batch_size / 256) for name in parts for rate in rates]
    heads = Heads(learned, grid, first.num_classes, used, seed, steps=steps)
    heads.fit(learned, first.train.labels[stay])
    held = Labeled(first.train.features[out], first.train.labels[out])
    tried = heads.logits({name: part.train.features[out] for name, part in parts.items()})
    scores = [accuracy(logits, held.labels) for logits in tried]
    best = max(range(len(grid)), key=lambda index: scores[index])
    logits = heads.logits({name: part.test.features for name, part in parts.items()})[best]
    names = [f"{name} lr {rate:.3g}" for name, rate in grid]
    settings = {"head": names[best], "validation": dict(zip(names, scores, strict=True)), "steps": steps}
    return ProbeResult(accuracy(logits, first.test.labels), logits, first.test.labels, settings)


class Heads(nn.Module):
    """Linear heads with learning rates of their own, trained on the same batches by one product per kind of features.

    The heads of a kind are one matrix ``(C H, F)``, class by class, so that a step reads its features once for all of
    them, and softmax runs over whole vectors of heads. Each head takes the steps that it would take alone.

    Args:
        features: Training features by kind, ``(N, F)`` each.
        grid: Kind of features and absolute learning rate of each head.
        num_classes: Number of classes C.
        protocol: Everything else.
        seed: Seed of weights and order.
        steps: Steps of the run; None follows from the epochs.

    Raises:
        ValueError: If there are several heads of one kind with LARS, whose ratio would be that of all of them.
    """

    def __init__(
        self,
        features: Mapping[str, Tensor],
        grid: Sequence[tuple[str, float]],
        num_classes: int,
        protocol: LinearProtocol,
        seed: int,
        *,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.num_classes, self.protocol, self.seed, self.steps = grid, num_classes, protocol, seed, steps
        self.places = {kind: [i for i, (name, _) in enumerate(grid) if name == kind] for kind in features}
        alone = protocol.optimizer != "lars" or len(grid) == 1
        require(alone, "grid", "hold one head with LARS", len(grid), 'Use `optimizer="sgd"` for a grid')
        generator = torch.Generator().manual_seed(derived_seed(seed, 3))
        drawn = [torch.randn(num_classes, features[kind].shape[1], generator=generator) for kind, _ in grid]
        self.weights, self.biases, self.norms = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        for kind, part in features.items():
            weight = torch.stack([drawn[place] for place in self.places[kind]], dim=1).flatten(0, 1) * protocol.init
            self.weights.append(weight.to(part.device))
            self.biases.append(torch.zeros(len(weight), device=part.device))
            norm = nn.BatchNorm1d(part.shape[1], affine=False, eps=1e-6) if protocol.normalize else nn.Identity()
            self.norms.append(norm.to(part.device))

    def forward(self, batches: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the logits of the heads of each kind, ``(B, C, H)``.

        Args:
            batches: Features by kind, ``(B, F)`` each.
        """
        parts = zip(self.norms, self.weights, self.biases, batches.values(), strict=True)
        return [F.linear(norm(x), weight, bias).view(len(x), self.num_classes, -1) for norm, weight, bias, x in parts]

    def fit(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Train the heads.

        Args:
            features: Training features by kind, ``(N, F)`` each.
            labels: Classes ``(N,)``.
        """
        self.train()
        used, rows = self.protocol, len(labels)
        per_epoch = -(-rows // used.batch_size)
        total = used.epochs * per_epoch if self.steps is None else self.steps
        step_heads = self._lars() if used.optimizer == "lars" else self._momentum_sgd()
        generator = torch.Generator().manual_seed(derived_seed(self.seed, 4))
        step = 0
        while step < total:
            order = torch.randperm(rows, generator=generator).to(labels.device)
            for batch in torch.split(order, used.batch_size):
                if step == total:
                    break
                found = self({kind: part.index_select(0, batch) for kind, part in features.items()})
                losses = []
                for logits in found:
                    targets = labels[batch].unsqueeze(1).expand(-1, logits.shape[2])
                    losses.append(F.cross_entropy(logits, targets, reduction="sum"))
                self.zero_grad()
                (torch.stack(losses).sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
                step_heads(self._rate(step // per_epoch * per_epoch if used.per_epoch else step, total))
                step += 1

    def _momentum_sgd(self) -> Callable[[float], None]:
        """Return a step of SGD with momentum, given a factor of the rates: `torch.optim.SGD` with a rate per row."""
        held = []
        for kind, weight, bias in zip(self.places, self.weights, self.biases, strict=True):
            rates = weight.new_tensor([self.grid[place][1] for place in self.places[kind]]).repeat(self.num_classes)
            held += [(weight, torch.zeros_like(weight), rates.unsqueeze(1)), (bias, torch.zeros_like(bias), rates)]

        @torch.no_grad()
        def step(factor: float) -> None:
            for parameter, momentum, rates in held:
                gradient = parameter.grad
                if self.protocol.weight_decay:
                    gradient.add_(parameter, alpha=self.protocol.weight_decay)
                momentum.mul_(_MOMENTUM).add_(gradient)
                update = gradient.add_(momentum, alpha=_MOMENTUM) if self.protocol.nesterov else momentum
                parameter.addcmul_(update, rates, value=-factor)

        return step

    def _lars(self) -> Callable[[float], None]:
        """Return a step of LARS for one head, given a factor of its rate; the bias is not adapted."""
        groups: list[dict[str, Any]] = [{"params": [*self.weights]}, {"params": [*self.biases], "adapt": False}]
        optimizer = LARS(groups, lr=0.0, momentum=_MOMENTUM, weight_decay=self.protocol.weight_decay)

        def step(factor: float) -> None:
            for group in optimizer.param_groups:
                group["lr"] = self.grid[0][1] * factor
            optimizer.step()

        return step

    @torch.no_grad()
    def logits(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the logits of each head, ``(M, C)``, in evaluation mode, in the order of the grid.

        Args:
            features: Features by kind, ``(M, F)`` each.
        """
        self.eval()
        rows = len(next(iter(features.values())))
        parts = [
            self({kind: part[start : start + _EVALUATED] for kind, part in features.items()})
            for start in range(0, rows, _EVALUATED)
        ]
        found: dict[int, Tensor] = {}
        for places, chunks in zip(self.places.values(), zip(*parts, strict=True), strict=True):
            found |= dict(zip(places, torch.cat(chunks).unbind(2), strict=True))
        return [found[place] for place in range(len(self.grid))]

    def _rate(self, step: int, total: int) -> float:
        """Return the factor of the learning rates at a step."""
        used = self.protocol
        if used.steps:
            return step_decay(step, [round(share * total) for share in used.steps], factor=used.factor)
        return warmup_cosine(step, round(used.warmup * total), total)


def _with(protocol: LinearProtocol, epochs: int | None, batch_size: int | None, rows: int) -> LinearProtocol:
    """Return a protocol with other numbers of epochs and rows per step, at most the number of training rows."""
    epochs = protocol.epochs if epochs is None else epochs
    batch_size = protocol.batch_size if batch_size is None else batch_size
    check_at_least("epochs", epochs, 1)
    check_at_least("batch_size", batch_size, 1)
    require(rows > 1 or not protocol.normalize, "train", "have two rows for BatchNorm", rows, "Use more images")
    return replace(protocol, epochs=epochs, batch_size=min(batch_size, rows))
