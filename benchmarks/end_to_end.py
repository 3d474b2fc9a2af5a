"""SimCLR from stored image to weight update, images per second: ours beside lightly with workers, and the bare step."""

import argparse
import logging
import time
import warnings
from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

import lightning_contrast as lc
from benchmarks.common import alternate, report

BATCH = 256


class EpochTimer(L.Callback):
    """Seconds from the start of the second epoch to the end of training: workers have started by then."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.start = time.perf_counter()

    def on_train_end(self, trainer, pl_module):
        self.seconds = time.perf_counter() - self.start


class PilEmoji(Dataset):
    """The same images as lightly's transform takes them."""

    def __init__(self, images, transform):
        from torchvision.transforms.functional import to_pil_image

        self.images, self.transform = [to_pil_image(image) for image in images], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


class LightlySimCLR(L.LightningModule):
    """SimCLR as lightly's examples write it, with the same network and optimizer.

    They leave convolutions in torch's usual memory format, where ours are channels-last.
    """

    def __init__(self, backbone, memory_format):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone, dim = lc.nn.build_backbone(backbone, small_images=backbone != "small_convnet")
        self.backbone.to(memory_format=memory_format)
        self.head, self.criterion = SimCLRProjectionHead(dim, dim, 128), NTXentLoss(temperature=0.1)

    def training_step(self, batch, batch_idx):
        z_a, z_b = (self.head(self.backbone(view)) for view in batch)
        return self.criterion(z_a, z_b)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(module, epochs, callbacks=(), batches=None, **data):
    """Train and return the images per second after the first epoch."""
    timer = EpochTimer()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    quiet["limit_train_batches"] = batches
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_model_summary=False, callbacks=[timer, *callbacks], **quiet
    )
    trainer.fit(module, **data)
    return (epochs - 1) * trainer.num_training_batches * BATCH / timer.seconds


def ours(backbone, epochs, batches=None):
    """Our data module, fused views and method, probes off."""
    settings = {"optimizer": "sgd", "lr": 0.01, "warmup_epochs": 0, "small_images": backbone != "small_convnet"}
    views = lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))
    return fit(lc.SimCLR(backbone, **settings), epochs, [views], batches, datamodule=lc.data.EmojiDataModule(BATCH))


def lightly(backbone, epochs, workers, batches=None, memory_format=torch.contiguous_format):
    """Lightly's transform in workers, its loss and its head."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)
    images = PilEmoji(lc.data.EmojiDataModule().images("train"), transform)
    options = {"num_workers": workers, "persistent_workers": workers > 0, "drop_last": True, "shuffle": True}
    return fit(
        LightlySimCLR(backbone, memory_format),
        epochs,
        (),
        batches,
        train_dataloaders=DataLoader(images, BATCH, **options),
    )


def bare_step(backbone, steps):
    """Forward, loss, backward and update on views that lie ready."""
    module = lc.SimCLR(backbone, small_images=backbone != "small_convnet")
    module.log = lambda *_, **__: None
    views = [torch.rand(BATCH, 3, 32, 32) for _ in range(2)]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        module.training_step(views, 0)["loss"].backward()
        optimizer.step()

    return BATCH / alternate({"step": step}, repeats=steps)["step"]["median_s"]


def main():
    """Run the candidates in turn and report medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backbones", nargs="+", default=["small_convnet", "resnet18"])
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = []
    for backbone in options.backbones:
        small = backbone == "small_convnet"
        batches = None if small else 2  # a ResNet-18 with a stride-1 stem takes a minute for an epoch here
        candidates = {
            "ours": partial(ours, backbone, 6 if small else 2, batches),
            "lightly, 2 workers": partial(lightly, backbone, 3 if small else 2, 2, batches),
            "lightly, 2 workers, channels-last": partial(
                lightly, backbone, 3 if small else 2, 2, batches, torch.channels_last
            ),
            "the bare step": partial(bare_step, backbone, 20 if small else 2),
        }
        rates = {name: [] for name in candidates}
        for _ in range(options.repeats):
            for name, call in candidates.items():
                rates[name].append(call())
        medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
        for name, rate in medians.items():
            rows.append(
                {"backbone": backbone, "candidate": name, "images/s": rate, "ours is x times": medians["ours"] / rate}
            )
    report("end_to_end", rows, f"SimCLR at 32 px on the emoji, batch {BATCH}; images per second after the first epoch.")


if __name__ == "__main__":
    main()
