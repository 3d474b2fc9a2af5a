"""Features, projections, teacher projections and prototype scores of a training step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import fail
from lightning_contrast.callbacks.capture.features import FeatureHook, ViewHook, count_images, named_layers
from lightning_contrast.callbacks.collapse.measurements import Entry
from lightning_contrast.contracts import batch_indices
from lightning_contrast.distributed import world_size
from lightning_contrast.nn.memory_bank import MemoryBank

PROJECTORS = ("projector", "projection_head")
PROTOTYPES = "prototypes"
WIDEST = 8192
"""Maximum width of projections; wider outputs are logits of a distillation head and only used for scores."""


class Recorder:
    """Hooks on the layers of a module that record the rows of one training step.

    Args:
        features: Source of the features, see `FeatureHook`.
        projections: Name of the projection layer; "auto" selects "projector" or "projection_head"; None for none.
        tokens: See `FeatureHook`.
        rows: Number of images to record of each batch, over all ranks.
    """

    def __init__(self, features: str, projections: str | None, tokens: str, rows: int) -> None:
        self.features, self.projections, self.rows = features, projections, rows
        self._feature_hook = FeatureHook(features, tokens)
        self._view_hooks: dict[str, ViewHook] = {}
        self._bank_rows: Tensor | None = None
        self._count = 0

    def attach(self, module: Any) -> None:
        """Attach hooks to the layers, which are looked up by name."""
        self._feature_hook.attach(module)
        wanted = self._wanted(module)
        for role in [role for role, hook in self._view_hooks.items() if wanted.get(role) != hook.features]:
            self._view_hooks.pop(role).detach()
        for role, name in wanted.items():
            limit = 1 if role == PROTOTYPES else 2
            hook = self._view_hooks.setdefault(role, ViewHook(name, limit=limit, only_rows=self._own_rows()))
            hook.attach(module)

    def detach(self) -> None:
        """Remove all hooks."""
        self._feature_hook.detach()
        for hook in self._view_hooks.values():
            hook.detach()
        self._view_hooks.clear()

    def arm(self, module: Any, batch: Any) -> None:
        """Record the next step.

        Args:
            module: The LightningModule.
            batch: The batch of the step.

        Raises:
            TypeError: If the batch contains no tensor with rows.
        """
        count = count_images(batch)
        if count == 0:
            rule = "contain a tensor with at least one row"
            fail("batch", rule, type(batch).__name__, "Yield images, or a container with tensors", TypeError)
        self._count = count
        for hook in (self._feature_hook, *self._view_hooks.values()):
            hook.arm(count)
        self._bank_rows = _bank_rows(module, batch)

    def collect(self, module: Any, outputs: Any) -> Entry:
        """Return the recorded rows by name, each ``(..., R, D)``, without synchronizing with the device.

        Args:
            module: The LightningModule.
            outputs: Return value of ``training_step``.

        Raises:
            ValueError: If a layer named by the user was not called, or its output does not have one row per image.
        """
        rows = self._own_rows()
        # Clone: a slice would keep the whole batch in memory.
        entry = {"features": self._feature_hook.read(module, outputs)[:rows].clone()}
        views = {role: hook.read_views() for role, hook in self._view_hooks.items()}
        for role in ("projections", "teacher"):
            found = views.get(role)
            if found is not None and found.shape[-1] <= WIDEST:
                entry[role] = found
        keys = outputs.get("keys") if isinstance(outputs, Mapping) else None
        if "teacher" in entry and isinstance(keys, Tensor):
            # With shuffled BatchNorm, the teacher sees images of other ranks; keys are in the original order.
            del entry["teacher"]
            if keys.ndim == 2 and len(keys) == self._count and keys.shape[1] <= WIDEST:
                entry["teacher"] = keys.detach().float()[:rows].clone().unsqueeze(0)
        if self.projections not in (None, "auto") and views.get("projections") is None:
            self._fail_projections()
        entry |= _scores(module, views) | self._banked(keys)
        return entry

    def _own_rows(self) -> int:
        return max(1, self.rows // world_size())

    def _wanted(self, module: nn.Module) -> dict[str, str]:
        """Return the names of the layers to hook by role."""
        layers = named_layers(module)
        name = self.projections
        if name == "auto":
            name = next((n for n in PROJECTORS if n in layers), None)
        wanted = {} if name is None else {"projections": name}
        if name in layers:
            names = {id(layer): n for n, layer in reversed(layers.items())}
            for online, momentum in momentum_pairs(module):
                if online is layers[name] and id(momentum) in names:
                    wanted["teacher"] = names[id(momentum)]
        if PROTOTYPES in layers:
            wanted[PROTOTYPES] = PROTOTYPES
        return wanted

    def _fail_projections(self) -> None:
        shape = self._view_hooks["projections"].refused()
        rule = "be a layer whose output is (B, D) or (n B, D) in each training step"
        hint = "Give another layer, or None for features only"
        fail(
            "projections",
            rule,
            f"{self.projections!r}, which {f'returned {shape}' if shape else 'was not called'}",
            hint,
        )

    def _banked(self, keys: Any) -> Entry:
        """Return new keys and the memory bank's keys of the same images before the step, ``(2, R, D)``."""
        old, self._bank_rows = self._bank_rows, None
        if old is None or not isinstance(keys, Tensor) or keys.shape != old.shape:
            return {}
        rows = self._own_rows()
        return {"keys": torch.stack([keys.detach().float()[:rows], old[:rows]])}


def momentum_pairs(module: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Return the momentum pairs of a module, empty if it has no such method."""
    pairs = getattr(module, "momentum_pairs", None)
    return list(pairs()) if callable(pairs) else []


def _bank_rows(module: Any, batch: Any) -> Tensor | None:
    """Return a memory bank's rows for the images of a batch, None without a bank or without indices."""
    queues = getattr(module, "queues", None)
    indices = batch_indices(batch)
    if not callable(queues) or indices is None or indices.is_floating_point() or indices.ndim != 1:
        return None
    bank = queues().get("keys")
    return bank.features[indices.to(bank.bits.device)].clone() if isinstance(bank, MemoryBank) else None


def _scores(module: Any, views: dict[str, Tensor | None]) -> Entry:
    """Return assignments, entropies and mean probabilities of a teacher's logits or of prototype scores."""
    temperature = getattr(module, "teacher_temperature", None)
    logits = views.get("teacher") if views.get("teacher") is not None else views.get("projections")
    center = getattr(getattr(module, "center", None), "value", None)
    if not isinstance(temperature, int | float):
        temperature, logits, center = getattr(module, "temperature", None), views.get(PROTOTYPES), None
    if logits is None or not isinstance(temperature, int | float):
        return {}
    logits = logits[0] - (center if isinstance(center, Tensor) else 0.0)
    probabilities = F.softmax(logits / temperature, dim=1)
    return {
        "winners": probabilities.argmax(dim=1, keepdim=True),
        "entropies": torch.special.entr(probabilities).sum(dim=1, keepdim=True),
        "mean": probabilities.mean(dim=0, keepdim=True),
    }
