"""What instance contrast loses of a clip and temporal contrast keeps: things, motions and moments of moving emoji.

Frozen features are judged by the probes of `moving_probes.py`, on things never seen.
"""

from moving_probes import clip_policy, run

import lightning_contrast as lc

TEMPORAL_OFF = {"local_weight": 0.0, "global_local_weight": 0.0}
ROWS = {  # arguments of the method, local clips, and how many times the epochs
    "random": ({}, 0, 0),
    "instance": (TEMPORAL_OFF, 0, 1),
    "instance, as many frames": (TEMPORAL_OFF, 0, 5),
    "instance + temporal": ({}, 4, 1),
}


def temporal_contrast(row, epochs):
    settings, local_clips, factor = row
    model = lc.TemporalContrast("small_video_convnet", lr=2e-3, weight_decay=0.01, warmup_epochs=1, **settings)
    return model, clip_policy(local_clips), factor * epochs


run(__doc__.splitlines()[0], ROWS, temporal_contrast, "temporal_emoji.jsonl")
