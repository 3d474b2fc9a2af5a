"""Your own DataModule: batches of tuples, dicts, a Hugging Face dataset, or tar shards read by webdataset."""

import argparse
import io
import tempfile
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

import lightning_contrast as lc


def tuples(images, labels, folder):
    """Items (image, label): uint8 or floats in 0..1 (C, H, W), not normalized, since the policy normalizes."""
    return TensorDataset(images, labels)


def dicts(images, labels, folder):
    """Items {"image", "label"} and whatever else there is."""
    return [{"image": image, "label": label, "note": "any"} for image, label in zip(images, labels, strict=True)]


def huggingface(images, labels, folder):
    """A dataset of Hugging Face with images, which are decoded in the loader; also datasets.load_dataset(...)."""
    import datasets  # pip install datasets

    kinds = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = {"image": [to_pil_image(image) for image in images], "label": labels.tolist()}
    decoded = datasets.Dataset.from_dict(rows, features=kinds)
    return decoded.with_transform(lambda rows: rows | {"image": [pil_to_tensor(image) for image in rows["image"]]})


def webdataset(images, labels, folder):
    """Tar shards as a stream without an end: `limit_train_batches` says how long an epoch is."""
    import webdataset as wds  # pip install webdataset

    with wds.ShardWriter(str(folder / "%04d.tar"), maxcount=500, verbose=0) as shards:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            to_pil_image(image).save(file := io.BytesIO(), "PNG")
            shards.write({"__key__": f"{row:06}", "png": file.getvalue(), "cls": int(label)})
    stream = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=8, seed=0).repeat().shuffle(1000)
    return stream.decode("pilrgb").to_tuple("png", "cls").map_tuple(pil_to_tensor, int)


KINDS = {kind.__name__: kind for kind in (tuples, dicts, huggingface, webdataset)}


class OwnData(L.LightningDataModule):
    """The bundled emoji as one kind of dataset; validation has tuples."""

    def __init__(self, kind, folder, source):
        super().__init__()
        self.train = KINDS[kind](source.images("train"), source.labels("train"), folder)
        self.val = TensorDataset(source.images("val"), source.labels("val"))

    def train_dataloader(self):
        """Return shuffled batches of one kind."""
        return DataLoader(self.train, 128, shuffle=not isinstance(self.train, IterableDataset), drop_last=True)

    def val_dataloader(self):
        """Return batches (images, labels)."""
        return DataLoader(self.val, 128)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--kind", choices=list(KINDS), default="tuples")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batches", type=int, default=19, help="per epoch")
if __name__ == "__main__":
    options = parser.parse_args()
    L.seed_everything(0)
    source, model = lc.data.EmojiDataModule(), lc.BYOL("small_convnet", optimizer="adamw", lr=2e-3, warmup_epochs=0)
    knn = lc.OnlineKNN(source.num_classes, dataloader=source)  # a stream is no bank: labeled images are given
    callbacks = [lc.ViewAugmentation(lc.BYOL.views(32)), knn]
    trainer = L.Trainer(max_epochs=options.epochs, limit_train_batches=options.batches, callbacks=callbacks)
    with tempfile.TemporaryDirectory() as folder:
        trainer.fit(model, datamodule=OwnData(options.kind, Path(folder), source))
    print(f"{options.kind}: k-NN top-1 {trainer.callback_metrics['knn/top1']:.3f}")
