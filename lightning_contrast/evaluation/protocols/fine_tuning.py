"""Fine-tuning of the whole network with a share of the labels, with the published recipes of 1 % and 10 %."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_contrast._checks import check_at_least, check_choice, check_interval, fail, require
from lightning_contrast.augment.images import as_float
from lightning_contrast.augment.policy import ViewPolicy, make_policy
from lightning_contrast.augment.view_spec import ViewSpec
from lightning_contrast.contracts import check_images
from lightning_contrast.evaluation.protocols.inputs import accuracy, class_share, held_out
from lightning_contrast.evaluation.protocols.linear import ProbeResult
from lightning_contrast.metrics.zero_shot import eval_mode
from lightning_contrast.optim import LARS, step_decay, warmup_cosine
from lightning_contrast.seeding import derived_seed, isolated

_TENTH = 0.03  # shares above it use the recipes of 10 %
_EVALUATED = 256  # images per pass at the end


@dataclass(frozen=True)
class FineTuneRecipe:
    """Hyper-parameters of a fine-tuning; of several rates or epochs the validation images choose one.

    Attributes:
        rates: Learning rates of the backbone and of the head, in pairs that are tried.
        epochs: Passes over the training images, which are tried.
        batch_size: Images per step over all GPUs of the paper.
        scaling: "none", "linear" for rates times batch / 256, or "sqrt" for rates times the root of the batch.
        optimizer: "sgd" or "lars"; the momentum is 0.9, and there is no weight decay.
        nesterov: Use Nesterov momentum.
        steps: Shares of the run after which the rate is multiplied by ``factor``; empty is a cosine to 0.
        factor: Of ``steps``.
        init: Standard deviation of the head's weights at the start; 0 is zeros.
        crop: Range of the share of the image that a random crop keeps, in (0, 1].
        flip: Probability of a horizontal flip.
        source: Where the numbers are from.
    """

    rates: tuple[tuple[float, float], ...]
    epochs: tuple[int, ...]
    batch_size: int = 256
    scaling: Literal["none", "linear", "sqrt"] = "none"
    optimizer: Literal["sgd", "lars"] = "sgd"
    nesterov: bool = False
    steps: tuple[float, ...] = ()
    factor: float = 0.2
    init: float = 0.01
    crop: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    source: str = ""


def _same(rates: Sequence[float]) -> tuple[tuple[float, float], ...]:
    return tuple((rate, rate) for rate in rates)


_SIMCLR = FineTuneRecipe(
    *(_same([0.05]), (60,), 4096, "linear"), nesterov=True, source="https://arxiv.org/abs/2002.05709, B.5"
)
_SIMCLR_V2 = FineTuneRecipe(
    *(_same([0.005]), (60,), 1024, "sqrt", "lars"), init=0.0, source="https://arxiv.org/abs/2006.10029, its code"
)
_BYOL = FineTuneRecipe(
    *(_same([0.005, 0.01, 0.02, 0.05, 0.1]), (30, 50), 1024),
    nesterov=True,
    source="https://arxiv.org/abs/2006.07733, C.1",
)
_SWAV = FineTuneRecipe(((0.02, 5.0),), (20,), steps=(0.6, 0.8), source="https://arxiv.org/abs/2006.09882, its code")
_BARLOW = FineTuneRecipe(((0.005, 0.5),), (20,), source="https://arxiv.org/abs/2103.03230, its code")
_VICREG = FineTuneRecipe(((0.03, 0.08),), (20,), source="https://arxiv.org/abs/2105.04906, its code")
_PAWS = FineTuneRecipe(_same([0.02]), (50,), init=0.0, source="https://arxiv.org/abs/2104.13963, its code")
_SMALL = FineTuneRecipe(
    *(((0.003, 0.03), (0.01, 0.1), (0.03, 0.3)), (60,), 32),
    nesterov=True,
    init=0.0,
    crop=(0.2, 1.0),
    source="not published: a small batch, so that a small set has some hundred steps",
)
FINE_TUNE_RECIPES: dict[str, tuple[FineTuneRecipe, FineTuneRecipe]] = {
    "small": (_SMALL, replace(_SMALL, epochs=(30,))),
    "simclr": (_SIMCLR, replace(_SIMCLR, epochs=(30,))),
    "simclr_v2": (_SIMCLR_V2, replace(_SIMCLR_V2, epochs=(30,))),
    "byol": (_BYOL, _BYOL),
    "swav": (_SWAV, replace(_SWAV, rates=((0.01, 0.2),))),
    "barlow_twins": (_BARLOW, _BARLOW),
    "vicreg": (_VICREG, replace(_VICREG, rates=((0.01, 0.1),))),
    "paws": (_PAWS, _PAWS),
}
"""Recipes by name, for 1 % and for 10 % of the labels; all but "small" are those of ImageNet."""


def fine_tune_rows(
    labels: Tensor, *, share: float = 0.01, validation_share: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw the training images that are fine-tuned on, and others that choose the settings.

    The share holds for each class, as in the lists of SimCLR for ImageNet, whose classes are about equally large; each
    class keeps one image at least. The validation images are drawn from the rest, so they are labels beyond the share.

    Args:
        labels: Classes ``(N,)``, integers; -1 for unlabeled rows, which are not drawn.
        share: Share of the labels, in (0, 1).
        validation_share: Share of the remaining images of each class, in (0, 1).
        seed: Seed of the draw, >= 0.

    Returns:
        Rows to train on, ``(A,)``, and to choose the settings on, ``(B,)``, ascending.

    Raises:
        ValueError: If a share is out of range or there are no labels.

    Example:
        >>> rows, validation = fine_tune_rows(torch.arange(200) % 2, share=0.1)
        >>> len(rows), len(validation)
        (20, 18)
    """
    check_interval("share", share, "(0, 1)", "0.01 is one percent of the labels")
    known = (labels >= 0).nonzero().flatten()
    require(len(known) > 0, "labels", "have labeled rows", "none", "-1 means unlabeled")
    chosen = class_share(labels[known], share, seed)
    rest = torch.ones(len(known), dtype=torch.bool)
    rest[chosen] = False
    others = known[rest]
    if len(others) == 0:
        return known[chosen], others
    _, out = held_out(labels[others], validation_share, derived_seed(seed, 12))
    return known[chosen], others[out]


def fine_tune(
    model: nn.Module,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    recipe: str | FineTuneRecipe = "small",
    share: float = 0.01,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> ProbeResult:
    """Train a network and a linear head on few labeled images, and measure the accuracy on test images.

    Each setting of the recipe starts from the weights that were given. The one that is best on the validation images,
    the first of equal ones, is measured on the test images. Images are augmented by random crops and flips at their own
    size, then preprocessed; normalization layers are in training mode. Afterwards, weights, buffers, gradients, modes
    and the random state are as before. Differs from the papers: a batch is at most the number of images, with the rate
    of that batch where the recipe scales it, and a short last batch of an epoch is dropped.

    Args:
        model: Module from the input to features ``(B, F)``. Parameters that require a gradient are trained; all of
            them if none does.
        train: Training images ``(N, C, H, W)``, uint8 or floating in 0..1; `fine_tune_rows` draws them.
        train_labels: Classes ``(N,)``, integers >= 0.
        test: Test images ``(M, C, H, W)``.
        test_labels: Classes ``(M,)``, integers >= 0.
        validation: Images and classes that choose the settings; None holds out a fifth of each class of ``train``, if
            there is something to choose.
        recipe: A name of `FINE_TUNE_RECIPES`, or hyper-parameters of your own.
        share: Share of the labels that ``train`` is, which selects the recipe of 1 % or (above 3 %) of 10 %.
        preprocess: Maps images in 0..1, ``(B, C, H, W)``, to the input; None: the images are the input.
        seed: Seed of head, order and crops, >= 0.

    Returns:
        Accuracy, logits ``(M, C)`` and settings: rates, epochs and the validation accuracy of all settings.

    Raises:
        ValueError: If a name is unknown, shapes do not match, there is one class only, or the training diverges.
        TypeError: If images are neither uint8 nor floating.

    Example:
        >>> net = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
        >>> images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 2
        >>> images[labels == 1] *= 0.2
        >>> fine_tune(net, images, labels, images, labels, recipe=FineTuneRecipe(((0.1, 1.0),), (20,))).top1
        1.0
    """
    used = _recipe(recipe, share)
    sets = {"train": (train, train_labels), "test": (test, test_labels)}
    if validation is not None:
        sets["validation"] = validation
    pixels = {name: _checked(name, *of) for name, of in sets.items()}
    classes = 1 + int(torch.cat([labels for _, labels in sets.values()]).max())
    several = bool((train_labels != train_labels[0]).any())
    hint = "A classifier needs at least two classes"
    require(several, "train_labels", "hold two classes or more", int(train_labels[0]), hint)
    images, labels = pixels["train"], train_labels.long()
    grid = list(product(used.rates, used.epochs))
    judged = (pixels["validation"], validation[1].long()) if validation is not None else None
    if judged is not None and len(judged[1]) == 0:
        judged = None
    if judged is None and len(grid) > 1:
        stay, out = held_out(labels, 0.2, seed)
        require(len(out) > 0, "train", "have a class with two images", len(images), "Give `validation` images")
        judged, images, labels = (images[out], labels[out]), images[stay], labels[stay]
    change = preprocess or (lambda given: given)
    tried: dict[str, float] = {}
    best, best_score, state = "", -1.0, None
    with restored(model), isolated(derived_seed(seed, 13)):
        start = _values(model)
        for rates, epochs in grid:
            _load(start)
            name = f"lr {rates[0]:.3g}, head {rates[1]:.3g}, {epochs} epochs"
            tuning = _Tuning(model, change, used, classes, derived_seed(seed, 14))
            tuning.fit(images, labels, rates, epochs)
            tried[name] = accuracy(tuning.logits(judged[0]), judged[1]) if judged is not None else 0.0
            if tried[name] > best_score:
                best, best_score = name, tried[name]
                state = (tuning, _values(model))
        tuning, values = cast("tuple[_Tuning, list[tuple[Tensor, Tensor]]]", state)
        _load(values)
        logits = tuning.logits(pixels["test"])
    finite = bool(logits.isfinite().all())
    require(finite, "recipe", "train without NaN", best, "Give a recipe with smaller `rates`")
    settings: dict[str, Any] = {
        "setting": best,
        "validation": tried if judged is not None else {},
        "images": len(labels),
    }
    settings["source"] = used.source
    return ProbeResult(accuracy(logits, test_labels), logits, test_labels.long(), settings)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore weights, buffers, gradients and modes of a module after the block, which may train it.

    Args:
        model: Any module.
    """
    values = _values(model)
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with eval_mode(model):  # restores the modes
        try:
            yield
        finally:
            for module, own in buffers:
                module._buffers.update(own)
            _load(values)
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


def _values(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return all tensors of a module with copies of them."""
    return [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]


@torch.no_grad()
def _load(values: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in values:
        tensor.copy_(value)


class _Tuning:
    """One training of a network with a new head."""

    def __init__(
        self, model: nn.Module, change: Callable[[Tensor], Tensor], recipe: FineTuneRecipe, classes: int, seed: int
    ) -> None:
        self.model, self.change, self.recipe, self.classes, self.seed = model, change, recipe, classes, seed
        self.parameters = [p for p in model.parameters() if p.requires_grad] or list(model.parameters())
        first = next(model.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.head: nn.Linear | None = None

    def features(self, images: Tensor) -> Tensor:
        """Return the features ``(B, F)`` of images ``(B, C, H, W)``."""
        found = self.model(self.change(as_float(images.to(self.device))))
        hint = "Fine-tune a network whose output is one vector per image"
        if not isinstance(found, Tensor) or found.ndim != 2:
            fail("model", "return features (B, F)", type(found).__name__, hint)
        return found.float()

    def fit(self, images: Tensor, labels: Tensor, rates: tuple[float, float], epochs: int) -> None:
        """Train on images (N, C, H, W); all draws come from torch's global generator, which is seeded here."""
        used, rows = self.recipe, len(images)
        batch = min(used.batch_size, rows)
        torch.manual_seed(self.seed)
        with eval_mode(self.model), torch.no_grad():
            width = self.features(images[:2]).shape[1]
        head = self.head = nn.Linear(width, self.classes).to(self.device)
        with torch.no_grad():
            head.weight.normal_(0, used.init) if used.init else head.weight.zero_()
            head.bias.zero_()
        optimizer = _optimizer(self.parameters, head, used)
        factor = {"none": 1.0, "linear": batch / 256, "sqrt": math.sqrt(batch)}[used.scaling]
        crops = _crops(images, used)
        per_epoch = rows // batch
        total, step = epochs * per_epoch, 0
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.model.train()
        for _ in range(epochs):
            order = torch.randperm(rows)
            for place in range(per_epoch):
                chosen = order[place * batch : (place + 1) * batch]
                share = self._factor(step, total)
                for group in optimizer.param_groups:
                    group["lr"] = rates[group["part"]] * factor * share
                logits = head(self.features(crops(images[chosen])[0]))
                optimizer.zero_grad()
                F.cross_entropy(logits, labels[chosen].to(self.device)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits ``(M, C)`` of images in evaluation mode, on the CPU."""
        head = cast("nn.Linear", self.head)
        with eval_mode(self.model):
            return torch.cat([head(self.features(part)).cpu() for part in torch.split(images, _EVALUATED)])

    def _factor(self, step: int, total: int) -> float:
        used = self.recipe
        if used.steps:
            return step_decay(step, [round(share * total) for share in used.steps], factor=used.factor)
        return warmup_cosine(step, 0, total)


def _optimizer(parameters: Sequence[nn.Parameter], head: nn.Linear, recipe: FineTuneRecipe) -> torch.optim.Optimizer:
    """Return an optimizer whose groups know their part: 0 is the backbone, 1 the head; biases are not adapted."""
    groups: list[dict[str, Any]] = []
    for part, own in enumerate((list(parameters), list(head.parameters()))):
        for matrices in (True, False):
            chosen = [p for p in own if (p.ndim > 1) == matrices]
            if chosen:
                groups.append({"params": chosen, "part": part, "lr": 0.0})
                if recipe.optimizer == "lars":
                    groups[-1]["adapt"] = matrices
    if recipe.optimizer == "lars":
        return LARS(groups, lr=0.0, momentum=0.9)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=recipe.nesterov)


def _crops(images: Tensor, recipe: FineTuneRecipe) -> ViewPolicy:
    channels, height, width = images.shape[1:]
    spec = ViewSpec((height, width), recipe.crop, jitter_p=0.0, gray_p=0.0, flip=recipe.flip)
    return make_policy([spec], channels=channels, color=channels == 3)


def _recipe(recipe: str | FineTuneRecipe, share: float) -> FineTuneRecipe:
    if isinstance(recipe, str):
        check_choice("recipe", recipe, FINE_TUNE_RECIPES)
        recipe = FINE_TUNE_RECIPES[recipe][share > _TENTH]
    require(
        len(recipe.rates) > 0 and len(recipe.epochs) > 0, "recipe", "have rates and epochs", recipe, "Give one each"
    )
    for epochs in recipe.epochs:
        check_at_least("epochs", epochs, 1)
    check_at_least("batch_size", recipe.batch_size, 2)
    return recipe


def _checked(name: str, images: Tensor, labels: Tensor) -> Tensor:
    """Return images ``(N, C, H, W)``, uint8 or float32, after checking them and their labels."""
    pixels = check_images(images, values=True, evaluating=True)
    fits = labels.shape == (len(images),) and not labels.is_floating_point()
    require(fits, f"{name}_labels", f"be integers of shape ({len(images)},)", tuple(labels.shape), "Give one per image")
    known = len(labels) == 0 or int(labels.min()) >= 0
    require(known, f"{name}_labels", "be >= 0", "unlabeled rows", "Leave unlabeled images out")
    require(len(images) > 0 or name == "validation", name, "hold at least one image", 0, "Give labeled images")
    return pixels
