"""Views chosen by an adversary, for every method with two views."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_choice, check_positive, check_probability, fail, require
from lightning_contrast.augment.bands import Pairs, follow_indices
from lightning_contrast.augment.policy import ViewPolicy
from lightning_contrast.augment.whole_images import WholeImages
from lightning_contrast.callbacks.capture.features import paused_hooks
from lightning_contrast.contracts import replace_images, split_batch
from lightning_contrast.losses import Negatives, rocl_loss
from lightning_contrast.losses.kernels.logsumexp import NegativeMask
from lightning_contrast.losses.kernels.normalization import normalize_rows
from lightning_contrast.losses.negatives import AnchorBatch, anchor_losses
from lightning_contrast.nn.auxiliary_batchnorm import MarkedRows, Route, add_auxiliary_batchnorm, route, unroute
from lightning_contrast.precision import upcast
from lightning_contrast.runtime.adversarial_pass import Attack, check_pixels, refuse_fsdp1, worst_view
from lightning_contrast.runtime.batch_transfer import BatchTransforms, map_batches
from lightning_contrast.seeding import derived_seed, seeded, send


class AdversarialView(L.Callback):
    """Replace a view of every training batch by an adversarial version of it, or add that as a further view.

    PGD (https://arxiv.org/abs/1706.06083) within the L-infinity ball around the view maximizes a loss of its embedding
    and that of another view of the image, by default the NT-Xent loss of RoCL (https://arxiv.org/abs/2006.07589). It
    runs before the step, after the callbacks that create the views, with the module in eval mode: BatchNorm's averages,
    gradients of weights, momentum networks, queues and the global generators stay as they are. The random start is a
    function of (seed, epoch, batch, rank), so a resumed run continues exactly. It costs ``steps`` forward and backward
    passes, in the precision of the Trainer; `GradientCache`, accumulation, DDP and FSDP2 are supported. FSDP1, whose
    shards cannot be differentiated outside a step, is refused.

    With ``auxiliary_batchnorm=True``, as in AdvProp (https://arxiv.org/abs/1911.09665), every BatchNorm of the module,
    also of its momentum networks, has a second set of statistics and affine parameters, for the adversarial view. The
    attack uses its averages; evaluation and exports use the first set. Networks are the children of the module: they
    must be called with whole views, or with features of whole views. It does not work with ``torch.compile`` of the
    whole module (compile its backbone) or with `nn.checkpoint_activations`, which are refused.
    Of a policy with index channels, such as those of satellite images, the bands are attacked and the indices follow.
    Differs from AdvProp: the loss is that of the method; the target is not a random label.

    With ``candidates`` above 1 the view is first replaced by the worst of k: that many views are drawn from the policy
    of the Trainer's `ViewAugmentation`, in crops of ``min_area`` or more, and for each image the one of greatest loss
    is taken, in ``candidates`` forward passes without gradient. With ``epsilon=0`` and ``steps=0`` it is not attacked.

    Args:
        epsilon: Largest change of a pixel in 0..1, from 0 to 1.
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
        auxiliary_batchnorm: Give every BatchNorm a second set for the adversarial view.
        candidates: Number of views of which the worst is taken, >= 1. The default loss of an image is then its InfoNCE
            among the other views of the global batch; a ``loss`` must return one value per image, (B,).
        min_area: Smallest share of the image area of a candidate, in 0..1.
        seed: Seed of the random start and of the candidates, >= 0.

    Raises:
        ValueError: If an argument is out of range, the module lacks a submodule, a batch lacks a view, pixels lie
            outside 0..1 (after undoing the normalization of the Trainer's view policy), the strategy is FSDP1, or
            something else cannot be combined with an option.
        TypeError: If a number is not whole, the loss cannot be called, or there is no policy for candidates.
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
        auxiliary_batchnorm: bool = False,
        candidates: int = 1,
        min_area: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.attack = Attack(epsilon, step_size, steps, random_start)
        check_at_least("view", view, 0)
        check_at_least("other", other, 0)
        require(view != other, "other", "be another view than `view`", other, "Give the index of the other view")
        check_positive("temperature", temperature)
        check_at_least("candidates", candidates, 1)
        check_probability("min_area", min_area, "It is a share of the image area")
        check_at_least("seed", seed, 0)
        if loss is not None and not callable(loss):
            hint = "Give a function of two embeddings (B, D)"
            fail("loss", "be callable", type(loss).__name__, hint, TypeError)
        require(len(modules) > 0, "modules", "name at least one submodule", modules, 'Give ("backbone", "projector")')
        self.view, self.other, self.add, self.seed = view, other, add, seed
        self.modules, self.loss, self.temperature = tuple(modules), loss, temperature
        self.auxiliary_batchnorm, self.candidates, self.min_area = auxiliary_batchnorm, candidates, min_area
        self._routes: dict[str, Route] = {}
        self._views: Any = None  # the ViewAugmentation that makes candidates
        self._candidate_policy: Any = None
        self._originals: list[Any] = []
        self._trainer: Any = None
        self._normalization: tuple[Tensor, Tensor, Pairs] | None = None  # of the run, from its first batch on

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Add the second sets of BatchNorm before the optimizers are created and checkpoints are loaded."""
        if stage != "fit" or not self.auxiliary_batchnorm:
            return
        whole = getattr(pl_module, "_compiler_ctx", None) is None
        hint = "Compile `model.backbone`, or leave one of both out"
        require(whole, "auxiliary_batchnorm", "be False if the whole module is compiled", True, hint)
        hint = "Leave `auxiliary_batchnorm` out: there is no BatchNorm"
        found = add_auxiliary_batchnorm(pl_module)
        require(found > 0, "auxiliary_batchnorm", "be False", type(pl_module).__name__, hint)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check strategy and module, and add the attack after all other transforms of batches."""
        refuse_fsdp1(trainer, type(self).__name__)
        names = [name for name, _ in pl_module.named_modules() if name]
        for name in self.modules:
            check_choice("modules", name, names)
            needed = _required(pl_module.get_submodule(name).forward)
            hint = 'Name networks of one input, such as ("backbone",) alone'
            require(len(needed) < 2, "modules", "take the output of the one before alone", f"{name}{needed}", hint)
        self._trainer, self._normalization = trainer, None
        BatchTransforms.add(trainer.strategy, self._transform)
        if self.candidates > 1:
            with_policy = (c for c in trainer.callbacks if isinstance(getattr(c, "policy", None), ViewPolicy))
            self._views = next(with_policy, None)
            if self._views is None:
                hint = "Place a ViewAugmentation with a policy of this package among the callbacks"
                fail("candidates", "be 1 without a policy to draw them from", self.candidates, hint, TypeError)
            self._candidate_policy = self._views.policy.candidates(self.view, self.candidates, self.min_area)
            BatchTransforms.add(trainer.strategy, self._keep_originals, first=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Route the BatchNorm layers, after strategies have wrapped them and all callbacks replaced ``forward``."""
        if self.auxiliary_batchnorm:
            self._routes = route(pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the attack."""
        self._remove(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the attack: `teardown` is not called after an exception."""
        self._remove(trainer, pl_module)

    def _remove(self, trainer: Any, pl_module: Any) -> None:
        BatchTransforms.remove(trainer.strategy, self._transform)
        BatchTransforms.remove(trainer.strategy, self._keep_originals)
        if self._routes:
            unroute(pl_module)
        self._routes, self._originals = {}, []
        self._views = self._candidate_policy = None

    def _keep_originals(self, batch: Any) -> Any:
        """Keep the images of which candidates are drawn."""
        self._originals = []
        if self._trainer.training:
            keep = lambda one: self._originals.append(split_batch(one, self._views.images)[0])  # noqa: E731
            map_batches(batch, keep, self._trainer.train_dataloader)
        return batch

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
        mean, std, indices = self._normalization
        networks = [module.get_submodule(name) for name in self.modules]
        seed = (self.seed, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        candidates = self._candidates(view, seed) if self.candidates > 1 else []
        with paused_hooks(module), trainer.precision_plugin.forward_context():
            if candidates:
                loss = self.loss or self._losses
                view = worst_view(networks, loss, candidates, other, adversarial=self._adversarial)
            pixels = view.float() * std + mean
            if first or pixels.device.type == "cpu":  # synchronizes with the device
                check_pixels(pixels)

            def normalize(bands: Tensor) -> Tensor:
                """Return the input of the networks (B, C, h, w) for attacked bands, with their indices."""
                return ((follow_indices(pixels, bands, indices) - mean) / std).to(view.dtype)

            attacked = self.attack.view(
                networks,
                self.loss or self._contrast,
                pixels[:, : pixels.shape[1] - len(indices)].clamp(0, 1),
                other,
                seed=seed,
                normalize=normalize,
                adversarial=self._adversarial,
            )
        adversarial = normalize(attacked)
        kept = list(views)
        if self.add:
            kept.append(adversarial)
        else:
            kept[self.view] = adversarial
        if self.auxiliary_batchnorm:
            place = len(kept) - 1 if self.add else self.view
            kept = [MarkedRows(one, ((len(one), number == place),)) for number, one in enumerate(kept)]
        return replace_images(batch, kept)

    def _candidates(self, view: Tensor, seed: tuple[int, ...]) -> list[Tensor]:
        """Draw views of which the worst is taken, ``(B, C, h, w)`` each."""
        policy, images = self._candidate_policy, self._originals.pop(0)
        if policy.strength != self._views.policy.strength:
            policy.set_strength(self._views.policy.strength)
        with torch.no_grad(), seeded(derived_seed(*seed, distributed.rank(), 1), view.device):
            candidates = policy(images if isinstance(images, Tensor | WholeImages) else images[self.view])
        return [candidate.as_subclass(Tensor).to(view.dtype) for candidate in candidates]

    @contextmanager
    def _adversarial(self) -> Iterator[None]:
        """Use the second sets of BatchNorm in passes in eval mode."""
        for one in self._routes.values():
            one.auxiliary = True
        try:
            yield
        finally:
            for one in self._routes.values():
                one.auxiliary = False

    def _contrast(self, embedding: Tensor, other: Tensor) -> Tensor:
        """Return RoCL's loss of embeddings (B, D)."""
        return rocl_loss(embedding, other, temperature=self.temperature)

    def _losses(self, embedding: Tensor, other: Tensor) -> Tensor:
        """Return the InfoNCE loss of each embedding (B, D) among those of the other views of all ranks, (B,)."""
        with torch.autocast(embedding.device.type, enabled=False):
            first, second = (normalize_rows(upcast(rows)) for rows in (embedding, other))
            positive, mask = (first * second).sum(1), NegativeMask(skip_partner=True)
            return anchor_losses(AnchorBatch(first, second, positive, 1 / self.temperature, mask), Negatives())


def _statistics(trainer: Any, view: Tensor) -> tuple[Tensor, Tensor, Pairs]:
    """Return mean and deviation (C, 1, 1) of the Trainer's view policy, 0 and 1 if it has none, and its indices."""
    specs = (getattr(getattr(callback, "policy", None), "input_spec", None) for callback in trainer.callbacks)
    spec: dict[str, Any] = next((spec for spec in specs if spec is not None), {})
    mean, std = spec.get("mean") or (0.0,), spec.get("std") or (1.0,)
    made = (torch.tensor(tuple(values), dtype=torch.float32) for values in (mean, std))
    first, second = (send(values[:, None, None], view.device) for values in made)
    return first, second, [(a, b) for a, b in spec.get("indices", [])]


def _required(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the parameters that a function must be given."""
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(function).parameters.values()
    return tuple(each.name for each in given if each.kind in plain and each.default is each.empty)
