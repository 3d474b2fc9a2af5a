"""What V-JEPA knows of a clip after a short run, beside its own random weights: things and motions of moving emoji.

Frozen features are judged by the probes of `moving_probes.py`, on things never seen.
"""

from moving_probes import run

import lightning_contrast as lc

STATISTICS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
ROWS = {"random": 0, "V-JEPA": 1}  # how many times the epochs


def vjepa(factor, epochs):
    sizes = {"backbone_kwargs": {"frames": 4}, "predictor_dim": 48, "predictor_depth": 2}
    rates = {"lr": 1e-3, "warmup_epochs": 1, "momentum": 0.99, "final_weight_decay": 0.04}
    policy = lc.VJEPA.views(32, frames=4, stride=4, flip=0.0, **STATISTICS)  # a flip would swap left and right
    return lc.VJEPA("small_video_vit", **sizes, **rates), policy, factor * epochs


run(__doc__.splitlines()[0], ROWS, vjepa, "vjepa_emoji.jsonl", **STATISTICS)
