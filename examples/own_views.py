"""Your own views: gray X-rays with a policy of the package, four-band satellite images with one of your own."""

import argparse

import kornia.augmentation as K
import lightning as L
import torch
from domain_images import chests, fields  # made-up images: X-rays (N, 1, 96, 96), fields (N, 4, 96, 96) in 0..10,000
from torch.utils.data import DataLoader, TensorDataset

import lightning_contrast as lc
from lightning_contrast import augment
from lightning_contrast.augment import domains, fused


def gray_policy():
    """X-rays: the side of the heart and the level of gray carry meaning, so there is no flip and a mild gamma."""
    return domains.chest_xray_views(64, mean=(0.4,), std=(0.25,), crop=(0.5, 1.0))


def four_band_policy():
    """Fields from above: any turn, blur, noise and gamma, but no jitter of colors, which bands do not have."""
    view = augment.ViewSpec(
        64,
        (0.3, 1.0),
        vertical_flip=0.5,
        quarter_turns=True,
        jitter_p=0.0,
        gray_p=0.0,
        blur_p=0.5,
        noise_p=0.3,
        last_operations=(fused.KorniaOperation(K.RandomGamma((0.8, 1.25)), p=0.5),),
    )
    bands = {"mean": (0.08, 0.13, 0.15, 0.32), "std": (0.01, 0.02, 0.05, 0.12)}  # of the images in 0..1
    return augment.make_policy([view, view], channels=4, color=False, scale=(0, 10_000), **bands)


KINDS = {"gray": (chests, gray_policy), "four_bands": (fields, four_band_policy)}


def main():
    """Train SimCLR with the views, and say how much better than chance it finds the other view of an image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=list(KINDS), default="gray")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    L.seed_everything(0)
    draw, make_policy = KINDS[options.kind]
    images, policy = draw(options.images), make_policy()
    channels = {"channels": images.shape[1]}
    model = lc.SimCLR("small_convnet", backbone_kwargs=channels, optimizer="adamw", lr=2e-3, warmup_epochs=0)
    loader = DataLoader(TensorDataset(images), 64, shuffle=True, drop_last=True)  # no labels
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=[lc.ViewAugmentation(policy)], limit_val_batches=0)
    torch.manual_seed(1)
    new = policy(draw(128))  # two views of images that training does not see
    before = lc.evaluation.recall_at_1(*(lc.evaluation.encode(model, view) for view in new))
    trainer.fit(model, loader)
    after = lc.evaluation.recall_at_1(*(lc.evaluation.encode(model, view) for view in new))
    print(f"{options.kind}: finds the other view among {len(new[0])}: {before:.3f}, trained {after:.3f}")


if __name__ == "__main__":
    main()
