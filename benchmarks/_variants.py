"""Rows of the learning table that change one setting of a recipe: negatives, temperature or views."""

_SIMCLR = "model.init_args"
_SHORT = "trainer.max_epochs=40"
_TEMPERATURE = f"{_SIMCLR}.temperature"
_NN = "lightning_contrast.nn"
_CHANGES = {
    "40 epochs": [],
    "stock views": ["trainer.callbacks.0.init_args.policy.init_args.fused=false"],
    "debiased": [f"{_SIMCLR}.weighting={{kind: debiased, tau_plus: 0.1}}"],
    "hard": [f"{_SIMCLR}.weighting={{kind: hard, tau_plus: 0.1, beta: 1.0}}"],
    "decoupled": [f"{_SIMCLR}.weighting=decoupled"],
    "decoupled_weighted": [f"{_SIMCLR}.weighting=decoupled_weighted"],
    "top 64": [f"{_SIMCLR}.weighting={{kind: top_k, k: 64}}"],
    "heated": [f"{_SIMCLR}.weighting={{kind: heated, heat: 0.5}}"],
    "same labels masked": [f"{_SIMCLR}.mask_same=label"],
    "learned temperature": [
        f"{_TEMPERATURE}={{class_path: {_NN}.LearnedTemperature, init_args: {{init: 0.2}}}}",
    ],
    "falling temperature": [
        f"{_TEMPERATURE}={{class_path: {_NN}.ScheduledTemperature, init_args: {{start: 0.5, end: 0.1}}}}",
    ],
}

VARIANTS: dict[str, tuple[str, list[str]]] = {
    f"simclr, {name}": ("simclr", [_SHORT, *changes]) for name, changes in _CHANGES.items()
}
"""For each row, the base recipe and its changes as ``key=value``."""
