"""Draw what the heads of a DINO teacher look at in scenes of several emoji.

Train first, 'python -m lightning_contrast fit --config examples/configs/dino_emoji.yaml', then give the checkpoint
that the run wrote to this script.
"""

import argparse
from pathlib import Path

import torch

import lightning_contrast as lc
from lightning_contrast import evaluation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint", type=Path, help="checkpoint of a DINO run with a vision transformer")
parser.add_argument("--scenes", type=int, default=4)
parser.add_argument("--size", type=int, default=96, help="edge of a scene in pixels, a multiple of the patch")
parser.add_argument("--mass", type=float, help="show the patches that hold this share of the attention; DINO has 0.6")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("attention.png"))
options = parser.parse_args()

model = lc.DINO.load_from_checkpoint(options.checkpoint, map_location="cpu", weights_only=True)
emoji = lc.data.EmojiDataModule().images("test")
scenes, things = evaluation.compose_scenes(emoji, options.scenes, size=options.size, seed=options.seed)

# The views of the run may have been normalised: its checkpoint tells how.
spec = torch.load(options.checkpoint, map_location="cpu", weights_only=True).get("input_spec") or {}
images = scenes.float() / 255
if spec.get("mean") is not None:
    mean, std = (torch.tensor(spec[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = (images - mean) / std

maps = evaluation.attention_maps(model.momentum_backbone, images)
figure = evaluation.attention_grid(scenes, maps, mass=options.mass)
figure.savefig(options.output)

patch = options.size // maps.shape[-1]
shares = torch.nn.functional.avg_pool2d(things.float().unsqueeze(1), patch)  # of each patch that things cover
attended = (maps * shares).sum((2, 3)) / maps.sum((2, 3))
print(f"Things cover {things.float().mean():.0%} of the scenes; of a head's attention they get", end=" ")
print(", ".join(f"{share:.0%}" for share in attended.mean(0)))
print(f"Wrote {options.output}")
