"""An attack on the agreement of two views of a module in training, which changes nothing but the view."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_contrast import distributed
from lightning_contrast._checks import check_at_least, check_not_negative, fail, require
from lightning_contrast.augment import pgd_attack
from lightning_contrast.contracts import TOLERANCE
from lightning_contrast.metrics.zero_shot import eval_mode
from lightning_contrast.seeding import derived_seed


@dataclass(frozen=True)
class Attack:
    """Numbers of an attack.

    Attributes:
        epsilon: Largest change of a pixel in 0..1, from 0 to 1.
        step_size: Change of a pixel per step, >= 0.
        steps: Number of steps, >= 0.
        random_start: Start at a random offset.
    """

    epsilon: float
    step_size: float
    steps: int
    random_start: bool

    def __post_init__(self) -> None:
        """Check the numbers."""
        hint = "It is the largest change of a pixel in 0..1, such as 8 / 255"
        check_not_negative("epsilon", self.epsilon, hint)
        require(self.epsilon <= 1, "epsilon", "be <= 1", self.epsilon, hint)
        check_not_negative("step_size", self.step_size, "It is the change of a pixel per step, such as 2 / 255")
        check_at_least("steps", self.steps, 0)

    def view(
        self,
        networks: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        pixels: Tensor,
        other: Tensor,
        *,
        seed: Sequence[int],
        normalize: Callable[[Tensor], Tensor] = lambda pixels: pixels,
        adversarial: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Tensor:
        """Return an adversarial version of images.

        The networks run in eval mode and get their modes back. Neither their gradients and statistics nor the global
        generators are changed.

        Args:
            networks: A backbone, which maps images ``(B, C, h, w)`` to features ``(B, F)``, and heads, each of which
                maps the output of the network before it.
            loss: Function of the embeddings ``(B, D)`` of the images and of the other view, to be maximized.
            pixels: Images in 0..1, ``(B, C, h, w)``.
            other: The other view as the backbone takes it, ``(B, C, h, w)``.
            seed: Parts of the seed of the random start; that of the rank is added.
            normalize: Maps pixels to what the backbone takes.
            adversarial: Context of the passes of the images, such as the choice of their BatchNorm.

        Returns:
            Images in 0..1, ``(B, C, h, w)``.
        """
        generator = torch.Generator().manual_seed(derived_seed(*seed, distributed.rank()))
        with _evaluating(networks) as embed:
            with torch.no_grad():
                target = embed(other)

            def disagreement(images: Tensor) -> Tensor:
                with adversarial():
                    embedding = embed(normalize(images))
                return loss(embedding, target)

            attacked = pgd_attack(
                disagreement,
                pixels,
                epsilon=self.epsilon,
                step_size=self.step_size,
                steps=self.steps,
                random_start=self.random_start,
                generator=generator,
            )
        return attacked


@torch.no_grad()
def worst_view(
    networks: Sequence[nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    candidates: Sequence[Tensor],
    other: Tensor,
    *,
    adversarial: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Return for each image the candidate of greatest loss, in one pass without gradient per candidate.

    The networks run in eval mode and get their modes back.

    Args:
        networks: As for `Attack.view`.
        loss: Function of the embeddings ``(B, D)`` of a candidate and of the other view; one value per image, ``(B,)``.
        candidates: Views ``(B, C, h, w)`` each, as the backbone takes them.
        other: The other view, ``(B, C, h, w)``.
        adversarial: As for `Attack.view`.

    Returns:
        Views ``(B, C, h, w)``.

    Raises:
        ValueError: If the loss has not one value per image.
    """
    with _evaluating(networks) as embed:
        target, values = embed(other), []
        for candidate in candidates:
            with adversarial():
                embedding = embed(candidate)
            values.append(loss(embedding, target))
    hint = "Return one value per image, or choose by the default loss"
    shape = tuple(values[0].shape)
    require(shape == (len(other),), "loss", f"return ({len(other)},) values to choose a candidate", shape, hint)
    worst = torch.stack(values).nan_to_num(-torch.inf).argmax(0)  # (B,); the first of equal ones
    return torch.stack(list(candidates), dim=1)[torch.arange(len(other), device=other.device), worst]


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Put networks into eval mode, and give the function of images ``(B, C, h, w)`` that they are one after another."""

    def embed(images: Tensor) -> Tensor:
        for network in networks:
            images = network(images)
        return images

    with ExitStack() as modes:
        for network in networks:
            modes.enter_context(eval_mode(network))
        yield embed
    for network in networks:
        if isinstance(network, FSDPModule):
            network.reshard()  # a pass without backward leaves the parameters whole


def check_pixels(images: Tensor) -> None:
    """Raise a ValueError unless all values of images ``(B, C, h, w)`` lie in 0..1; synchronizes with the device."""
    if len(images) == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(images))
    hint = "Give views without mean and std: the normalization belongs into the backbone"
    require(low >= -TOLERANCE and high <= 1 + TOLERANCE, "views", "lie in 0..1 for an attack", (low, high), hint)


def refuse_fsdp1(trainer: Any, name: str) -> None:
    """Raise a ValueError under FSDP1, whose shards cannot be differentiated with respect to images alone.

    Args:
        trainer: The Trainer.
        name: Who attacks, for the message.
    """
    if isinstance(trainer.strategy, FSDPStrategy):
        hint = "Use DDP, or FSDP2 with `ModelParallelStrategy`"
        fail("strategy", f"not be FSDP1 with {name}", type(trainer.strategy).__name__, hint)
