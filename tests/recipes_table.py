"""Numbers of the sources that recipes in ``examples/configs`` name, written down independently of the package.

Rates are functions of the epoch (from 0, fractions allowed) and of the number of epochs. ``decayed`` and ``adapted``
name the parameters that have weight decay and a trust ratio of LARS in the source.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Rate = Callable[[float, int], float]


@dataclass(frozen=True)
class View:
    """One view as a source describes it."""

    size: int
    crop: tuple[float, float]
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.8
    gray: float = 0.2
    blur: float = 0.0
    solarize: float = 0.0
    flip: float = 0.5
    bicubic: bool = False
    gray_first: bool = False
    additive_brightness: bool = False


@dataclass(frozen=True)
class Source:
    """What a source says of one run.

    Attributes:
        epochs: Length of the run.
        batch: Images per optimizer step.
        optimizer: Class name.
        options: Options of the optimizer's first group.
        rate: Learning rate of the weights, at an epoch of a run of this many.
        weight_decay: At the start and at the end of the run.
        views: One entry per view.
        settings: Attributes of the method, with dots for nested ones.
        arguments: Arguments of the method as published, such as widths, which the test makes smaller.
        momentum: Start, end and schedule of the teacher's momentum.
        decayed: Parameters with weight decay: "weights" or "all".
        adapted: Parameters with a trust ratio under LARS: "weights" or "all".
        undecayed: Submodules and parameters that the source treats like norms and biases.
        vectors: Learning rate of norms and biases as a share of that of the weights.
        constant: Name of a submodule whose learning rate is constant.
        statistics: Mean and standard deviation that are subtracted and divided by; None if the source has none or
            does not say.
        images: Images in the training set.
    """

    epochs: int
    batch: int
    optimizer: str
    options: dict[str, Any]
    rate: Rate
    weight_decay: tuple[float, float]
    views: list[View]
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    momentum: tuple[float, float, str] | None = None
    decayed: str = "weights"
    adapted: str = "weights"
    undecayed: tuple[str, ...] = ()
    vectors: float = 1.0
    constant: str | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    images: int = 1_281_167


def cosine(peak: float, warmup: float = 0, *, start: float = 0.0, end: float = 0.0, stretch: float = 1.0) -> Rate:
    """Linear from ``start`` to ``peak``, then half a cosine to ``end`` over ``stretch`` times the run."""

    def rate(epoch: float, epochs: int) -> float:
        if epoch < warmup:
            return start + (peak - start) * epoch / warmup
        progress = (epoch - warmup) / (stretch * epochs - warmup)
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


def steps(peak: float, *epochs_of_drop: int) -> Rate:
    """Divided by 10 at each of these epochs."""
    return lambda epoch, epochs: peak * 0.1 ** sum(epoch >= drop for drop in epochs_of_drop)


SGD = {"momentum": 0.9}
LARS = {"momentum": 0.9, "trust_coefficient": 0.001, "trust_form": "A", "clip": False}
LARC = {"momentum": 0.9, "trust_coefficient": 0.001, "trust_form": "B", "clip": False}
SOLO = {"momentum": 0.9, "trust_coefficient": 0.02, "trust_form": "B", "clip": True}
ADAMW = {"betas": (0.9, 0.999)}

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
PER_IMAGE = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # mean of the images' own standard deviations

BYOL_JITTER, WEAK_JITTER, SIMCLR_JITTER = (0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.2)


def pair(size: int, crop: tuple[float, float], jitter: tuple[float, float, float, float], **same: Any) -> list[View]:
    return [View(size, crop, jitter, **same)] * 2


def asymmetric(size: int, crop: tuple[float, float], *, blur: tuple[float, float], **same: Any) -> list[View]:
    first, second = blur
    return [
        View(size, crop, BYOL_JITTER, blur=first, **same),
        View(size, crop, BYOL_JITTER, blur=second, solarize=0.2, **same),
    ]


SOLO_VIEWS = asymmetric(32, (0.08, 1), blur=(0, 0), bicubic=True)
MOCO_V2_VIEWS = pair(224, (0.2, 1), WEAK_JITTER, blur=0.5)


def dino(views: int, glob: tuple[float, float], local: tuple[float, float], jitter=BYOL_JITTER) -> list[View]:
    locals_ = [View(96, local, jitter, blur=0.5, bicubic=True)] * views
    return asymmetric(224, glob, blur=(1.0, 0.1), bicubic=True) + locals_


def solo(peak: float, weight_decay: float, **rest: Any) -> Source:
    """solo-learn's CIFAR-10 runs: 1,000 epochs with batches of 256, LARS, a warm-up of 10 epochs, a cosine to 0."""
    base: dict[str, Any] = {"views": SOLO_VIEWS, "statistics": CIFAR10, "images": 50_000}
    rate = cosine(peak, 10, start=3e-5)
    return Source(1000, 256, "LARS", SOLO, rate, (weight_decay, weight_decay), **(base | rest))


DINO_TEMPERATURES = {
    "student_temperature": 0.1,
    "schedules.teacher_temperature": 0.07,
    "schedules.warmup_teacher_temperature": 0.04,
    "schedules.warmup_teacher_temperature_epochs": 30,
    "schedules.freeze_last_layer_epochs": 1,
    "schedules.clip_grad": 3.0,
    "center.momentum": 0.9,
}

CIFAR10_SOURCES: dict[str, Source] = {
    "align_uniform_cifar10": Source(
        200,
        768,
        "SGD",
        SGD,
        steps(0.36, 155, 170, 185),
        (1e-4, 1e-4),
        pair(32, (0.08, 1), (0.4, 0.4, 0.4, 0.4), jitter_p=1.0),  # 64 pixels for STL-10
        {"align_weight": 1.0, "uniform_weight": 1.0, "alpha": 2.0, "t": 2.0},
        {"projection_dim": 128},
        decayed="all",
        images=50_000,
    ),
    "barlow_twins_cifar10": solo(
        0.3,
        1e-4,
        settings={"off_diagonal_weight": 0.0051, "loss_scale": 0.1},
        arguments={"hidden_dim": 2048, "projection_dim": 2048},
    ),
    "byol_cifar10": solo(
        1.0, 1e-5, arguments={"hidden_dim": 4096, "projection_dim": 256}, momentum=(0.99, 1.0, "cosine")
    ),
    "dino_cifar10": solo(
        0.3,
        1e-6,
        settings={
            "student_temperature": 0.1,
            "schedules.teacher_temperature": 0.07,
            "schedules.warmup_teacher_temperature_epochs": 0,
            "schedules.clip_grad": None,
        },
        arguments={"hidden_dim": 2048, "bottleneck_dim": 256, "num_prototypes": 4096},
        momentum=(0.9995, 1.0, "cosine"),
    ),
    "moco_v3_cifar10": solo(
        0.3,
        1e-6,
        settings={"temperature": 0.2},
        arguments={"hidden_dim": 4096, "projection_dim": 256},
        momentum=(0.99, 1.0, "cosine"),
    ),
    "nnclr_cifar10": solo(
        0.4,
        1e-5,
        settings={"temperature": 0.2},
        arguments={"hidden_dim": 2048, "projection_dim": 256, "predictor_dim": 4096, "queue_size": 65536},
    ),
    "swav_cifar10": solo(
        0.6,
        1e-6,
        views=pair(32, (0.08, 1), SIMCLR_JITTER, blur=0.5, bicubic=True),
        settings={"temperature": 0.1, "freeze_prototypes_epochs": 2, "queue_start_epoch": 50},
        arguments={"hidden_dim": 2048, "projection_dim": 128, "num_prototypes": 3000, "queue_size": 3840},
    ),
    "vicreg_cifar10": solo(
        0.3,
        1e-4,
        views=pair(32, (0.2, 1), BYOL_JITTER, solarize=0.1, bicubic=True),
        settings={"invariance_weight": 25.0, "variance_weight": 50.0, "covariance_weight": 1.0},  # not halved
        arguments={"hidden_dim": 2048, "projection_dim": 2048},
    ),
    "moco_cifar10": Source(
        200,
        512,
        "SGD",
        SGD,
        cosine(0.06),
        (5e-4, 5e-4),
        pair(32, (0.08, 1), WEAK_JITTER),
        {"temperature": 0.1, "symmetric": True, "shuffle": True, "batchnorm_splits": 8},
        {"head_layers": 1, "projection_dim": 128, "queue_size": 4096},
        (0.99, 1.0, "constant"),
        decayed="all",
        statistics=PER_IMAGE,
        images=50_000,
    ),
    "npid_cifar10": Source(
        200,
        128,
        "SGD",
        SGD,
        steps(0.03, 120, 160),
        (5e-4, 5e-4),
        [View(32, (0.2, 1), (0.4, 0.4, 0.4, 0.4), jitter_p=1.0, flip=0.0)],
        {"temperature": 0.1, "num_negatives": 0, "bank.momentum": 0.5},
        {"projection_dim": 128},
        decayed="all",
        statistics=PER_IMAGE,
        images=50_000,
    ),
    "simclr_cifar10": Source(
        1000,
        512,
        "LARS",
        LARS,
        cosine(2.0, 10),
        (1e-4, 1e-4),
        pair(32, (0.08, 1), WEAK_JITTER, bicubic=True),
        {"temperature": 0.5},
        {"head_layers": 3, "projection_dim": 128},
        images=50_000,
    ),
    "simsiam_cifar10": Source(
        800,
        512,
        "SGD",
        SGD,
        cosine(0.06),
        (5e-4, 5e-4),
        pair(32, (0.2, 1), WEAK_JITTER),
        {},
        {"head_layers": 2, "projection_dim": 2048, "predictor_dim": 512},
        decayed="all",
        constant="predictor",
        images=50_000,
    ),
    "spectral_cifar10": Source(
        800,
        512,
        "SGD",
        SGD,
        cosine(0.06, 10),
        (5e-4, 5e-4),
        pair(32, (0.2, 1), WEAK_JITTER),
        {"mu": 1.0},
        {"head_layers": 2, "hidden_dim": 2048, "projection_dim": 1000},
        decayed="all",
        images=50_000,
    ),
    "supcon_cifar10": Source(
        1000,
        1024,
        "SGD",
        SGD,
        cosine(0.5, 10, start=0.01, end=0.0005),
        (1e-4, 1e-4),
        pair(32, (0.2, 1), WEAK_JITTER),
        {"temperature": 0.1, "base_temperature": 0.07},
        {"projection_dim": 128},
        decayed="all",
        statistics=PER_IMAGE,
        images=50_000,
    ),
    "wmse_cifar10": Source(
        1000,
        512,
        "Adam",
        ADAMW,
        lambda epoch, epochs: 3e-3 * min(1, epoch / 5) * 0.2 ** ((epoch >= epochs - 50) + (epoch >= epochs - 25)),
        (1e-6, 1e-6),  # a warm-up of 500 steps
        pair(32, (0.2, 1), WEAK_JITTER, gray=0.1, bicubic=True),
        {"whitening_iterations": 1, "whitening_eps": 0.0},
        {"hidden_dim": 1024, "projection_dim": 64, "whitening_size": 128},
        decayed="all",
        statistics=PER_IMAGE,
        images=50_000,
    ),
}

IMAGE_TEXT_SOURCES: dict[str, Source] = {
    "clip_laion400m": Source(
        40,
        32768,
        "AdamW",
        {"betas": (0.9, 0.98), "eps": 1e-6},
        cosine(5e-4, 1),
        (0.2, 0.2),
        [View(224, (0.9, 1), jitter_p=0.0, gray=0.0, flip=0.0, bicubic=True)],
        {
            "logit_scale.maximum": 100.0,
            "text_backbone.vocab_size": 49408,
            "text_backbone.context_length": 77,
            "text_backbone.width": 512,
            "image_projection.out_features": 512,
            "mask_same": None,
            "locked_image": False,
        },
        {"text_kwargs": {"width": 512, "layers": 12, "heads": 8}},
        undecayed=("text_backbone.positions", "backbone.pos_embed", "backbone.cls_token"),
        statistics=((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        images=10_000 * 32768,
    ),
}
