"""What masked prediction makes of the parts of an emoji that it does not see, after a short run of MAE and of SimMIM.

Writes one picture per method, of test things: the image, its visible patches, and these filled by the prediction. The
printed error is that of the hidden pixels, beside the error of a gray guess (the mean color of the training images).
"""

import argparse
from pathlib import Path

import lightning as L
import torch

import lightning_contrast as lc

MEAN, STD = (0.84, 0.8, 0.75), (0.28, 0.26, 0.33)
SMALL = {"backbone_kwargs": {"embed_dim": 64, "depth": 3, "num_heads": 2}, "lr": 2e-3, "warmup_epochs": 2}
METHODS = {
    "mae": lambda: lc.MAE(
        "small_vit", decoder_dim=48, decoder_depth=1, decoder_heads=4, normalize_pixels=False, **SMALL
    ),
    "simmim": lambda: lc.SimMIM("small_vit", **SMALL),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("reconstructions"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, make in METHODS.items():
        L.seed_everything(0)
        model, data = make(), lc.data.EmojiDataModule(batch_size=64)
        policy = type(model).views(32, scale=(0.4, 1.0), mean=MEAN, std=STD)
        trainer = L.Trainer(
            max_epochs=options.epochs,
            callbacks=[lc.ViewAugmentation(policy), lc.StepSeed(0)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(model, data)
        things = data.images("val")
        images = policy.eval_transform(things[torch.linspace(0, len(things) - 1, options.images).long()])
        torch.manual_seed(0)  # the masks
        filled, mask = model.eval().reconstruct(images)
        cut = [lc.losses.patchify(part, patch_size=4)[mask] for part in (images, filled, torch.zeros_like(images))]
        errors = [float((cut[0] - guess).abs().mean()) for guess in cut[1:]]
        print(f"{name}: mean absolute error of hidden pixels {errors[0]:.3f}, of a gray guess {errors[1]:.3f}")
        figure = lc.evaluation.reconstruction_grid(images, filled, mask, mean=MEAN, std=STD)
        figure.savefig(options.output / f"{name}.png")


if __name__ == "__main__":
    main()
