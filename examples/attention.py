"""Draw the attention maps of a DINO teacher on scenes of several emoji.

Train first with 'lightning-contrast fit --config dino_emoji', and pass the checkpoint of the run to this script.
"""

import argparse
from pathlib import Path

import torch

import lightning_contrast as lc
from lightning_contrast import evaluation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint", type=Path, help="checkpoint of a DINO run with a vision transformer")
parser.add_argument("--scenes", type=int, default=4)
parser.add_argument("--size", type=int, default=96, help="edge of a scene in pixels, a multiple of the patch size")
parser.add_argument("--mass", type=float, help="show the patches with this share of the attention; 0.6 in DINO")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output", type=Path, default=Path("attention.png"))
options = parser.parse_args()

model = lc.DINO.load_from_checkpoint(options.checkpoint, map_location="cpu", weights_only=True)
emoji = lc.data.EmojiDataModule().images("test")
scenes, objects = evaluation.compose_scenes(emoji, options.scenes, size=options.size, seed=options.seed)

# The mean and standard deviation of the policy are stored in the checkpoint.
spec = torch.load(options.checkpoint, map_location="cpu", weights_only=True).get("input_spec") or {}
images = scenes.float() / 255
if spec.get("mean") is not None:
    mean, std = (torch.tensor(spec[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = (images - mean) / std

maps = evaluation.attention_maps(model.momentum_backbone, images)
figure = evaluation.attention_grid(scenes, maps, mass=options.mass)
figure.savefig(options.output)

patch = options.size // maps.shape[-1]
shares = torch.nn.functional.avg_pool2d(objects.float().unsqueeze(1), patch)  # covered share of each patch
attended = (maps * shares).sum((2, 3)) / maps.sum((2, 3))
print(f"Objects cover {objects.float().mean():.0%} of the scenes; share of the attention per head:", end=" ")
print(", ".join(f"{share:.0%}" for share in attended.mean(0)))
print(f"Wrote {options.output}")
