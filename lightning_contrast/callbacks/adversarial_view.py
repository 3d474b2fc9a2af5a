"""Views chosen by an adversary, for every method with two views."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_contrast._checks import check_at_least, check_choice, check_positive, fail, require
from lightning_contrast.callbacks.capture.features import paused_hooks
from lightning_contrast.contracts import replace_images, split_batch
from lightning_contrast.losses import rocl_loss
from lightning_contrast.runtime.adversarial_pass import Attack, check_pixels, refuse_fsdp1
from lightning_contrast.runtime.batch_transfer import BatchTransforms, map_batches
from lightning_contrast.seeding import send


class AdversarialView(L.Callback):
    """Replace a view of every training batch by an adversarial version of it, or add that as a further view.

    PGD (https://arxiv.org/abs/1706.06083) within the L-infinity ball around the view maximizes a loss of its embedding
    and that of another view of the image, by default the NT-Xent loss of RoCL (https://arxiv.org/abs/2006.07589). It
    runs before the step, after the callbacks that create the views, with the module in eval mode: BatchNorm's averages,
    gradients of weights, momentum networks, queues and the global generators stay as they are. The random start is a
    function of (seed, epoch, batch, rank), so a resumed run continues exactly. It costs ``steps`` forward and backward
    passes, in the precision of the Trainer; `GradientCache`, accumulation, DDP and FSDP2 are supported. FSDP1, whose
    shards cannot be differentiated outside a step, is refused.

    Differs from AdvProp (https://arxiv.org/abs/1911.09665): there is no auxiliary BatchNorm; in training both kinds of
    views share their statistics.

    Args:
        epsilon: Largest change of a pixel in 0..1, >= 0.
        step_size: Change of a pixel per step, >= 0.
        steps: Number of steps, >= 0.
        random_start: Start at an offset that is uniform in [-epsilon, epsilon].
        view: Index of the view to attack.
        other: Index of the view that it is to disagree with.
        add: Add the adversarial view after the given ones, for methods with any number of views; False replaces the
            view.
        modules: Names of the submodules that map a view (B, C, h, w) to its embedding (B, D), in their order.
        loss: Function of the embeddings (B, D) of the attacked and of the other view, to be maximized; None is
            `losses.rocl_loss` of both with ``temperature``.
        temperature: Divisor of the cosine similarities of the default loss, > 0.
        seed: Seed of the random start, >= 0.

    Raises:
        ValueError: If an argument is out of range, the module lacks a submodule, a batch lacks a view, pixels lie
            outside 0..1 (after undoing the normalization of the Trainer's view policy), or the strategy is FSDP1.
        TypeError: If a number is not whole, or the loss cannot be called.
    """

    def __init__(
        self,
        epsilon: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 5,
        *,
        random_start: bool = True,
        view: int = 0,
        other: int = 1,
        add: bool = False,
        modules: Sequence[str] = ("backbone", "projector"),
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        temperature: float = 0.5,
        seed: int = 0,
    ) -> None:
        self.attack = Attack(epsilon, step_size, steps, random_start)
        check_at_least("view", view, 0)
        check_at_least("other", other, 0)
        require(view != other, "other", "be another view than `view`", other, "Give the index of the other view")
        check_positive("temperature", temperature)
        check_at_least("seed", seed, 0)
        if loss is not None and not callable(loss):
            hint = "Give a function of two embeddings (B, D)"
            fail("loss", "be callable", type(loss).__name__, hint, TypeError)
        require(len(modules) > 0, "modules", "name at least one submodule", modules, 'Give ("backbone", "projector")')
        self.view, self.other, self.add, self.seed = view, other, add, seed
        self.modules, self.loss, self.temperature = tuple(modules), loss, temperature
        self._trainer: Any = None
        self._normalization: tuple[Tensor, Tensor] | None = None  # of the run, on its device, from its first batch on

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check strategy and module, and add the attack after all other transforms of batches."""
        refuse_fsdp1(trainer, type(self).__name__)
        names = [name for name, _ in pl_module.named_modules() if name]
        for name in self.modules:
            check_choice("modules", name, names)
        self._trainer, self._normalization = trainer, None
        BatchTransforms.add(trainer.strategy, self._transform)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the attack."""
        BatchTransforms.remove(trainer.strategy, self._transform)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the attack: `teardown` is not called after an exception."""
        BatchTransforms.remove(trainer.strategy, self._transform)

    def _transform(self, batch: Any) -> Any:
        """Attack a view of a training batch; other batches are returned as they are."""
        trainer = self._trainer
        if not trainer.training:
            return batch
        return map_batches(batch, self._attacked, trainer.train_dataloader)

    def _attacked(self, batch: Any) -> Any:
        """Return a batch with an adversarial view."""
        views, _ = split_batch(batch)
        last = max(self.view, self.other)
        hint = "Place a ViewAugmentation with two views among the callbacks, or correct `view` and `other`"
        if isinstance(views, Tensor) or len(views) <= last:
            fail("batch", f"hold at least {last + 1} views", 1 if isinstance(views, Tensor) else len(views), hint)
        trainer, module = self._trainer, self._trainer.lightning_module
        view, other = views[self.view], views[self.other]
        first = self._normalization is None
        if self._normalization is None:
            self._normalization = _statistics(trainer, view)
        mean, std = self._normalization
        pixels = view.float() * std + mean
        if first or pixels.device.type == "cpu":  # synchronizes with the device
            check_pixels(pixels)
        networks = [module.get_submodule(name) for name in self.modules]
        batch_idx = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # incremented after the transfer
        with paused_hooks(module), trainer.precision_plugin.forward_context():
            attacked = self.attack.view(
                networks,
                self.loss or self._contrast,
                pixels.clamp(0, 1),
                other,
                seed=(self.seed, trainer.current_epoch, batch_idx),
                normalize=lambda images: ((images - mean) / std).to(view.dtype),
            )
        adversarial = ((attacked - mean) / std).to(view.dtype)
        kept = list(views)
        if self.add:
            kept.append(adversarial)
        else:
            kept[self.view] = adversarial
        return replace_images(batch, kept)

    def _contrast(self, embedding: Tensor, other: Tensor) -> Tensor:
        """Return RoCL's loss of embeddings (B, D)."""
        return rocl_loss(embedding, other, temperature=self.temperature)


def _statistics(trainer: Any, view: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (C, 1, 1) that the Trainer's view policy normalizes with; 0 and 1 if it does not."""
    specs = (getattr(getattr(callback, "policy", None), "input_spec", None) for callback in trainer.callbacks)
    spec: dict[str, Any] = next((spec for spec in specs if spec is not None), {})
    mean, std = spec.get("mean") or (0.0,), spec.get("std") or (1.0,)
    made = (torch.tensor(tuple(values), dtype=torch.float32) for values in (mean, std))
    first, second = (send(values[:, None, None], view.device) for values in made)
    return first, second
