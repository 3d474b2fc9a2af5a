"""What `CollapseMonitor` reads of a step: features, projections, the teacher's, and the scores of prototypes."""

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
"""Outputs that are wider are not kept as projections: the logits of a distillation head are counted as scores."""


class Recorder:
    """Taps a module's layers and gives the rows of one step for the reservoir.

    Args:
        features: Where the features come from, see `FeatureHook`.
        projections: Name of the layer of the projections; "auto" looks for "projector" and "projection_head"; None.
        tokens: See `FeatureHook`.
        rows: Images kept of each batch over all ranks.
    """

    def __init__(self, features: str, projections: str | None, tokens: str, rows: int) -> None:
        self.features, self.projections, self.rows = features, projections, rows
        self._tap = FeatureHook(features, tokens)
        self._taps: dict[str, ViewHook] = {}
        self._bank_rows: Tensor | None = None
        self._count = 0

    def attach(self, module: Any) -> None:
        """Hook the layers, which are looked up by name anew."""
        self._tap.attach(module)
        wanted = self._wanted(module)
        for role in [role for role, tap in self._taps.items() if wanted.get(role) != tap.features]:
            self._taps.pop(role).detach()
        for role, name in wanted.items():
            limit = 1 if role == PROTOTYPES else 2
            tap = self._taps.setdefault(role, ViewHook(name, limit=limit, only_rows=self._own_rows()))
            tap.attach(module)

    def detach(self) -> None:
        """Take all hooks away."""
        self._tap.detach()
        for tap in self._taps.values():
            tap.detach()
        self._taps.clear()

    def expect(self, module: Any, batch: Any) -> None:
        """Read the coming step.

        Raises:
            TypeError: If there is no tensor in the batch whose rows could be counted.
        """
        count = count_images(batch)
        if count == 0:
            rule = "hold a tensor with at least one row"
            fail("batch", rule, type(batch).__name__, "Yield images, or a container with tensors", TypeError)
        self._count = count
        for tap in (self._tap, *self._taps.values()):
            tap.arm(count)
        self._bank_rows = _bank_rows(module, batch)

    def collect(self, module: Any, outputs: Any) -> Entry:
        """Return what the step gave, each ``(..., R, D)``; nothing here waits for the device.

        Raises:
            ValueError: If a layer that the user named was not called, or gave something else than rows of features.
        """
        rows = self._own_rows()
        entry = {"features": self._tap.read(module, outputs)[:rows].clone()}  # a slice would keep the whole batch
        views = {role: tap.read_views() for role, tap in self._taps.items()}
        for role in ("projections", "teacher"):
            found = views.get(role)
            if found is not None and found.shape[-1] <= WIDEST:
                entry[role] = found
        keys = outputs.get("keys") if isinstance(outputs, Mapping) else None
        if "teacher" in entry and isinstance(keys, Tensor):
            # A step that returns keys may have exchanged images between ranks before it made them: theirs is the order.
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
        """Return the layers to tap by their role."""
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
        shape = self._taps["projections"].refused()
        rule = "name a layer that gives (B, D) or (n B, D) in each training step"
        hint = "Name another layer, or None for the features alone"
        fail("projections", rule, f"{self.projections!r}, which {f'gave {shape}' if shape else 'was not called'}", hint)

    def _banked(self, keys: Any) -> Entry:
        """Return the keys beside the rows that the memory bank held of the same images before the step."""
        old, self._bank_rows = self._bank_rows, None
        if old is None or not isinstance(keys, Tensor) or keys.shape != old.shape:
            return {}
        rows = self._own_rows()
        return {"keys": torch.stack([keys.detach().float()[:rows], old[:rows]])}


def momentum_pairs(module: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Return a module's momentum pairs, none where it has no such method."""
    pairs = getattr(module, "momentum_pairs", None)
    return list(pairs()) if callable(pairs) else []


def _bank_rows(module: Any, batch: Any) -> Tensor | None:
    """Return a memory bank's rows of the images of a batch, where there is one and the loader gives indices."""
    queues = getattr(module, "queues", None)
    indices = batch_indices(batch)
    if not callable(queues) or indices is None or indices.is_floating_point() or indices.ndim != 1:
        return None
    bank = queues().get("keys")
    return bank.features[indices.to(bank.bits.device)].clone() if isinstance(bank, MemoryBank) else None


def _scores(module: Any, views: dict[str, Tensor | None]) -> Entry:
    """Return who wins each image and how sure that is: of a teacher's logits, or of prototypes' scores."""
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
