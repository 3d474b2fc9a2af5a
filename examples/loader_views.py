"""Views that the loader makes, by Albumentations or by the transforms of lightly: no `ViewAugmentation` is needed."""

import argparse

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

import lightning_contrast as lc

MEAN, STD = (0.84, 0.8, 0.75), (0.28, 0.26, 0.33)


class LoaderViews(Dataset):
    """Items ([view, view, ...], label), collated to a list of normalized views (B, C, h, w) and labels (B,)."""

    def __init__(self, images, labels, views):
        self.images, self.labels, self.views = images, labels, views

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.views(self.images[index]), int(self.labels[index])


def albumentations_views(size, mean, std, *, random=True):
    """Return a function from an image to two random views, or to the normalized image alone."""
    import albumentations as A  # pip install albumentations

    jitter = A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8)
    steps = [A.RandomResizedCrop((size, size), scale=(0.08, 1)), A.HorizontalFlip(), jitter, A.ToGray(p=0.2)]
    transform = A.Compose([*(steps if random else []), A.Normalize(mean, std), A.ToTensorV2()])

    def views(image):
        pixels = image.permute(1, 2, 0).numpy()  # (C, H, W) to (H, W, C)
        if not random:
            return transform(image=pixels)["image"]
        transform.set_random_seed(int(torch.randint(2**31, ())))  # its own generator is equal in all workers
        return [transform(image=pixels)["image"] for _ in range(2)]

    return views


def lightly_views(size, mean, std, *, random=True):
    """The same with lightly's transform of SimCLR."""
    from lightly.transforms import SimCLRTransform
    from torchvision.transforms import v2

    normalize = {"mean": list(mean), "std": list(std)}
    views = SimCLRTransform(size, cj_strength=0.5, gaussian_blur=0.0, normalize=normalize)
    plain = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**normalize)])
    return lambda image: (views if random else plain)(to_pil_image(image))


LIBRARIES = {"albumentations": albumentations_views, "lightly": lightly_views}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=list(LIBRARIES), default="albumentations")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, default=19, help="per epoch")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    L.seed_everything(0, workers=True)
    data, make = lc.data.EmojiDataModule(), LIBRARIES[options.library]

    def loader(split, *, random):
        rows = LoaderViews(data.images(split), data.labels(split), make(32, MEAN, STD, random=random))
        return DataLoader(rows, 128, shuffle=random, drop_last=random, num_workers=options.workers)

    model = lc.SimCLR("small_convnet", optimizer="adamw", lr=2e-3, warmup_epochs=0)
    knn = lc.OnlineKNN(data.num_classes, dataloader=loader("train", random=False))  # unchanged images, not views
    trainer = L.Trainer(max_epochs=options.epochs, limit_train_batches=options.batches, callbacks=[knn])
    trainer.fit(model, loader("train", random=True), loader("val", random=False))
    print(f"{options.library}: k-NN top-1 {trainer.callback_metrics['knn/top1']:.3f}")
