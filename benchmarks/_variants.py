"""Rows of the learning table that change a recipe: negatives, temperature, views, batches, queue, or what is distilled.

Keys that begin with ``run.`` are no settings of the recipe; `learn.run` reads them.
"""

_MODEL = "model.init_args"
_SHORT = "trainer.max_epochs=40"
_TEMPERATURE = f"{_MODEL}.temperature"
_NN = "lightning_contrast.nn"
_CHANGES = {
    "40 epochs": [],
    "stock views": ["trainer.callbacks.0.init_args.policy.init_args.fused=false"],
    "debiased": [f"{_MODEL}.weighting={{kind: debiased, tau_plus: 0.1}}"],
    "hard": [f"{_MODEL}.weighting={{kind: hard, tau_plus: 0.1, beta: 1.0}}"],
    "decoupled": [f"{_MODEL}.weighting=decoupled"],
    "decoupled_weighted": [f"{_MODEL}.weighting=decoupled_weighted"],
    "top 64": [f"{_MODEL}.weighting={{kind: top_k, k: 64}}"],
    "heated": [f"{_MODEL}.weighting={{kind: heated, heat: 0.5}}"],
    "same labels masked": [f"{_MODEL}.mask_same=label"],
    "learned temperature": [
        f"{_TEMPERATURE}={{class_path: {_NN}.LearnedTemperature, init_args: {{init: 0.2}}}}",
    ],
    "falling temperature": [
        f"{_TEMPERATURE}={{class_path: {_NN}.ScheduledTemperature, init_args: {{start: 0.5, end: 0.1}}}}",
    ],
    "near neighbors": ["run.near_neighbors=8"],
    "growing strength": [
        "trainer.callbacks.0.init_args.strength="
        "{class_path: lightning_contrast.augment.StrengthSchedule, init_args: {start: 0.2, end: 1.0}}",
    ],
}
_QUEUE = f"{_MODEL}.queue_size=2048"
_NARROW = f"{_MODEL}.backbone_kwargs={{width: 8}}"
_DISTILLED = {
    "features": [],
    "compress": [_QUEUE],
    "disco": [
        _QUEUE,
        "trainer.callbacks.0.init_args.policy="
        "{class_path: lightning_contrast.augment.simclr_cifar_views, init_args: {size: 32}}",
    ],
    "rkd": [],
    "crd": ["data.init_args.indices=true", f"{_MODEL}.num_samples=2492", f"{_MODEL}.num_negatives=256"],
}

VARIANTS: dict[str, tuple[str, list[str]]] = {
    **{f"simclr, {name}": ("simclr", [_SHORT, *changes]) for name, changes in _CHANGES.items()},
    "moco, int4 queue": ("moco", [f"{_MODEL}.queue_dtype=int4"]),
    "simclr, width 8": ("simclr", [_NARROW]),
    **{f"distill, {loss}": ("distill", [f"{_MODEL}.loss={loss}", *more]) for loss, more in _DISTILLED.items()},
}
"""For each row, the base recipe and its changes as ``key=value``."""
