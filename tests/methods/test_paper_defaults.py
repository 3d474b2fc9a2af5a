"""Defaults of masked prediction, joint embedding and dense methods are those of their papers."""

import inspect
import math

import pytest

import lightning_contrast as lc
from tests.methods.cases import make
from tests.tolerances import near64

# Name: (peak rate, batch, end of the schedule as a share of the peak, epochs of warm-up, further defaults).
# A schedule that ends at an absolute rate has None.
JOINT = {"hidden_dim": 2048, "optimizer": "adamw", "weight_decay": 0.05}
DEFAULTS = {
    "MAE": (1.5e-4, 256, 0, 40, {"weight_decay": 0.05, "mask_ratio": 0.75, "normalize_pixels": True}),
    "SimMIM": (2e-4, 512, 0, 10, {"weight_decay": 0.05, "mask_ratio": 0.6, "mask_unit": 2}),
    "Data2Vec": (2e-3, 2048, 0, 10, {"weight_decay": 0.05, "mask_ratio": 120 / 196, "beta": 2.0, "momentum": 0.9998}),
    "VJEPA": (
        6.25e-4,
        3072,
        None,
        40,
        {"weight_decay": 0.04, "final_weight_decay": 0.4, "final_lr": 1e-6, "warmup_start": 0.32}
        | {"momentum": 0.998, "schedule_stretch": 1.25, "predictor_dim": 384, "predictor_depth": 12, "exponent": 1.0}
        | {"short_blocks": 8, "short_scale": 0.15, "long_blocks": 2, "long_scale": 0.7, "aspect": (0.75, 1.5)},
    ),
    "LeJEPA": (5e-4, 512, 1e-3, 10, JOINT | {"regularizer_weight": 0.05, "num_slices": 1024, "knots": 17, "t_max": 3}),
    "VISReg": (9e-4, 128, 1e-3, 5, JOINT | {"regularizer_weight": 0.9, "num_slices": 4096, "projection_dim": 256}),
    "TiCo": (
        0.2,
        256,
        0,
        10,
        {"weight_decay": 1.5e-6, "momentum": 0.99, "hidden_dim": 4096, "projection_dim": 256}
        | {"covariance_momentum": 0.9, "covariance_weight": 8.0, "detach_covariance": False},
    ),
    "WMSE": (3e-3, 512, 0.04, 5, {"weight_decay": 1e-6, "hidden_dim": 1024, "projection_dim": 64, "whitening_eps": 0}),
    "MMCR": (0.6, 256, 1e-3, 10, {"weight_decay": 1e-6, "hidden_dim": 8192, "projection_dim": 512, "local_weight": 0}),
    "DenseCL": (
        0.03,
        256,
        0,
        0,
        {"dense_weight": 0.5, "queue_size": 65536, "momentum": 0.999, "temperature": 0.2, "weight_decay": 1e-4},
    ),
    "VICRegL": (
        0.3,
        256,
        1e-3,
        10,
        {"global_weight": 0.75, "weight_decay": 1e-6, "matches": (20, 4), "all_feature_matches": True}
        | {"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0}
        | {"hidden_dim": 8192, "projection_dim": 8192, "map_hidden_dim": 512, "map_projection_dim": 512},
    ),
    "DINOv3": (
        2e-4,
        1024,
        1,
        100,
        {"gram_weight": 2.0, "gram_updates": 3, "momentum": 0.994, "layer_decay": 0.98, "clip_grad": 30.0}
        | {"weight_decay": 0.04, "patch_lr_multiplier": 0.2, "koleo_weight": 0.1, "freeze_last_layer_epochs": 5},
    ),
    "ExemplarCNN": (0.01, 256, 0.01, 0, {"dropout": 0.5, "optimizer": "sgd", "weight_decay": 0.0}),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_paper(name):
    rate, batch, end, warmup, rest = DEFAULTS[name]
    method = getattr(lc, name)
    given = {key: parameter.default for key, parameter in inspect.signature(method).parameters.items()}
    assert {key: given[key] for key in rest} == rest
    assert given.get("lr") is None
    scale = {"linear": batch / 256, "sqrt": math.sqrt(batch)}[method.lr_rule]
    assert method.base_lr * scale == pytest.approx(rate)
    epochs = given.get("warmup_epochs")
    assert (method.default_warmup_epochs if epochs is None else epochs) == warmup
    if end is not None:
        assert make(name).lr_factor(1000, 10, 1000) == near64(end, size=1.0)


@pytest.mark.parametrize(("name", "betas"), [("MAE", (0.9, 0.95)), ("DINOv3", (0.9, 0.99)), ("Data2Vec", None)])
def test_betas_of_adamw(name, betas):
    assert getattr(lc, name).adamw_options.get("betas") == betas


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Data2Vec", (0.9, 0.9, "constant")),
        ("VJEPA", (0.9, 0.98, "linear")),  # 1 at the end of schedules that are 1.25 times as long as the run
        ("TiCo", (0.9, 1.0, "cosine")),
        ("MMCR", (0.9, None, "constant")),
        ("DenseCL", (0.9, None, "constant")),
        ("DINOv3", (0.9, None, "constant")),
    ],
)
def test_momentum_of_the_teacher(name, expected):
    callback = next(c for c in make(name, momentum=0.9).default_callbacks() if isinstance(c, lc.MomentumUpdate))
    start, end, schedule = expected
    assert (callback.start, callback.schedule) == (start, schedule)
    assert end is None or callback.end == pytest.approx(end)
