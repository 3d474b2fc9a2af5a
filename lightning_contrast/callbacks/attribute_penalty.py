"""Features that say less about a protected attribute, for every method."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lightning_contrast._checks import (
    check_at_least,
    check_choice,
    check_positive,
    fail,
    require,
)
from lightning_contrast.callbacks.capture.features import count_images
from lightning_contrast.callbacks.capture.labels import check_place, read_labels
from lightning_contrast.callbacks.capture.penalty import FeaturePenalty
from lightning_contrast.distributed import all_reduce_mean, global_mean, is_distributed
from lightning_contrast.losses import hsic_loss
from lightning_contrast.seeding import seeded

_HIDDEN = 64
_TINY = 1e-12  # weight of an image of unknown group, so that a batch without a known one has the loss 0


class AttributePenalty(FeaturePenalty):
    """Add a penalty on the dependence of features on a protected attribute to the loss of any module.

    ``weight * losses.hsic_loss(features, attribute)`` is added to the loss before its backward pass, with the features
    of all views of the global batch; the loss that the module logs stays its own. Works with mixed precision,
    accumulation (a penalty per micro-batch), DDP, FSDP, `GradientCache` and manual optimization. There is no further
    forward pass. Logs ``<name>/hsic``, without the weight.

    With ``penalty="adversary"`` it is gradient reversal instead (https://arxiv.org/abs/1505.07818): a classifier of the
    group, with one hidden layer of 64 units on the features, which are centered and scaled per image, is trained by
    AdamW in each step; the features get ``-weight`` times the gradient of its cross entropy, the mean over the known
    images of the global batch. Logs ``<name>/cross_entropy`` in nats; that of a classifier that can tell nothing is
    log(G) for G groups of one size. The classifier is in checkpoints and equal on all ranks.

    Independence also removes what the attribute has in common with the task. Watch a probe of the attribute
    (`OnlineLinearProbe` with ``labels=``) and one of the task: a penalty that lowers neither does nothing.

    Args:
        labels: Where the attribute is, ``(B,)`` integers, below 0 for unknown: a key of dict batches, an index into
            tuple batches, or a function of the batch.
        penalty: "hsic" or "adversary".
        weight: Weight of the penalty, >= 0; `losses.hsic_loss` is at most 0.5 for two groups of the same size, and
            mostly below 0.05.
        features: Name of the submodule whose output is penalized: ``(n B, F)``, tokens ``(n B, N, F)`` or maps
            ``(n B, F, H, W)``, which are averaged, of n views.
        bandwidth: As of `losses.hsic_loss`, > 0.
        num_groups: G, the number of groups, >= 2; "adversary" needs it.
        adversary_lr: Learning rate of the classifier, > 0.
        name: Prefix of the log key; must be unique among the `AttributePenalty` callbacks of a Trainer.

    Raises:
        TypeError: If ``labels`` is no place in a batch, or the attribute not an integer tensor.
        ValueError: If a number is out of range, no submodule has that name, it is not called with gradient in a step,
            its output does not fit the batch, or a group is not below ``num_groups``.
    """

    def __init__(
        self,
        labels: str | int | Callable[[Any], Tensor],
        *,
        penalty: Literal["hsic", "adversary"] = "hsic",
        weight: float = 1.0,
        features: str = "backbone",
        bandwidth: float = 1.0,
        num_groups: int | None = None,
        adversary_lr: float = 1e-3,
        name: str = "attribute",
    ) -> None:
        check_place("labels", labels)
        if labels is None:
            hint = "Give a key, an index, or a function of the batch"
            fail("labels", "say where the protected attribute is", labels, hint, TypeError)
        super().__init__(weight, features, name)
        check_positive("bandwidth", bandwidth)
        check_choice("penalty", penalty, ("hsic", "adversary"))
        check_positive("adversary_lr", adversary_lr)
        self.adversary: GroupAdversary | None = None
        if penalty == "adversary":
            hint = "Give the number of groups"
            require(num_groups is not None, "num_groups", 'be given for penalty="adversary"', num_groups, hint)
            self.adversary = GroupAdversary(num_groups or 0, adversary_lr)
        self.labels, self.bandwidth = labels, bandwidth
        self._groups = torch.empty(0)  # of the batch of a step, (B,)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the classifier, if there is one."""
        return {} if self.adversary is None else self.adversary.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the classifier."""
        if self.adversary is not None:
            self.adversary.load_state_dict(state_dict)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the attribute of the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        groups = read_labels(batch, self.labels, type(self).__name__)
        size = count_images(batch)
        require(len(groups) == size, "labels", f"be {size}, one for each image", len(groups), "Check their place")
        if self.adversary is not None and (batch_idx == 0 or groups.device.type == "cpu"):  # synchronizes
            self.adversary.check(groups)
        self._groups = groups.to(pl_module.device)

    def penalty(self, pl_module: Any, rows: Tensor, size: int) -> Tensor:
        """Return the dependence of features on the attribute, or minus the cross entropy of the adversary.

        Args:
            pl_module: The LightningModule.
            rows: Features ``(n B, F)`` of all views, one view after the other.
            size: B, the number of images.
        """
        of_rows = self._groups.repeat(len(rows) // size)
        if self.adversary is None:
            value = hsic_loss(rows, of_rows, bandwidth=self.bandwidth)
            pl_module.log(f"{self.name}/hsic", value.detach(), batch_size=size)
        else:
            value = -self.adversary.step(rows, of_rows)
            pl_module.log(f"{self.name}/cross_entropy", -value.detach(), batch_size=size)
        return value


class GroupAdversary:
    """A classifier of the group that is trained on features which are not changed by that.

    Args:
        num_groups: G, the number of groups, >= 2.
        lr: Learning rate of AdamW, > 0.
    """

    def __init__(self, num_groups: int, lr: float) -> None:
        check_at_least("num_groups", num_groups, 2)
        self.num_groups, self.lr = num_groups, lr
        self.network: nn.Sequential | None = None  # built by the first features
        self.optimizer: torch.optim.Optimizer | None = None
        self._pending: dict[str, Any] = {}

    def check(self, groups: Tensor) -> None:
        """Raise a ValueError unless groups ``(B,)`` are below G."""
        high = int(groups.max()) if len(groups) else 0
        hint = "Set `num_groups`; unknown groups are below 0"
        require(high < self.num_groups, "labels", f"be below `num_groups` = {self.num_groups}", high, hint)

    def step(self, features: Tensor, groups: Tensor) -> Tensor:
        """Train one step, and return the cross entropy before it, a scalar with a gradient for the features alone.

        Args:
            features: ``(B, F)``.
            groups: ``(B,)`` in 0 .. G - 1; below 0: unknown, without influence.
        """
        with torch.autocast(features.device.type, enabled=False), torch.enable_grad():
            network, optimizer = self._built(features)
            fixed = {name: weight.detach().clone() for name, weight in network.named_parameters()}
            found = self._loss(network, fixed, features, groups)
            optimizer.zero_grad()
            self._loss(network, dict(network.named_parameters()), features.detach(), groups).backward()  # type: ignore[no-untyped-call]
            if is_distributed():
                for weight in network.parameters():
                    weight.grad = None if weight.grad is None else all_reduce_mean(weight.grad)
            optimizer.step()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the state of the optimizer, on the CPU."""
        if self.network is None or self.optimizer is None:
            return dict(self._pending)
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return tree_map(lambda value: value.detach().cpu().clone() if isinstance(value, Tensor) else value, state)  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state until the first features, which say how wide they are and where."""
        self._pending, self.network, self.optimizer = dict(state), None, None

    def _loss(self, network: nn.Module, weights: dict[str, Tensor], features: Tensor, groups: Tensor) -> Tensor:
        rows = F.layer_norm(features.float(), features.shape[1:])
        logits = torch.func.functional_call(network, weights, (rows,))
        known = groups >= 0
        entropy = F.cross_entropy(logits, groups.clamp(min=0), reduction="none") * known
        return global_mean(entropy, known.float().clamp_min(_TINY))

    def _built(self, features: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
        network, optimizer = self.network, self.optimizer
        if network is None or optimizer is None or network[0].in_features != features.shape[1]:
            with seeded(0, features.device):
                layers = nn.Linear(features.shape[1], _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, self.num_groups)
            network = nn.Sequential(*layers).to(features.device)
            optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr)
            if self._pending:
                network.load_state_dict(self._pending["network"])
                optimizer.load_state_dict(self._pending["optimizer"])
                self._pending = {}
            self.network, self.optimizer = network, optimizer
        return network, optimizer
