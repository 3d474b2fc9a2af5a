"""Batches of images and texts have labels only in a dict: nobody takes tokens or captions for classes."""

import inspect

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast import callbacks
from lightning_contrast.callbacks.capture.labels import find_labels, read_classes
from lightning_contrast.contracts import batch_indices, batch_labels, batch_texts, split_batch
from lightning_contrast.runtime.batch_transfer import transform_images
from tests.callbacks.probe_modules import quiet_fit
from tests.methods.cases import TEXTS, TinyBackbone
from tests.methods.test_contract import run_step

B, L_TOKENS, CLASSES = 6, 4, 3
NAMES = ["red", "green", "blue"]
G = torch.Generator().manual_seed(0)
IMAGES = torch.rand(B, 3, 16, 16, generator=G)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
WORDS = [NAMES[label] for label in LABELS.tolist()]
TOKENS = torch.randint(1, 200, (B, L_TOKENS), generator=G)
LAYOUTS = {
    "tokens": (IMAGES, TOKENS),
    "int32 tokens": [IMAGES, TOKENS.int()],
    "words": (IMAGES, WORDS),
    "words, then classes": (IMAGES, WORDS, LABELS),
    "tokens, then classes": (IMAGES, TOKENS, LABELS),
    "views and tokens": ([IMAGES, IMAGES], TOKENS),
    "dict": {"image": IMAGES, "text": WORDS},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)

READERS = {
    "OnlineLinearProbe": lambda: lc.OnlineLinearProbe(CLASSES),
    "OnlineLinearProbe, training": lambda: lc.OnlineLinearProbe(CLASSES, bank="train"),
    "OnlineLinearProbe, numbers": lambda: lc.OnlineLinearProbe(L_TOKENS, task="regression"),
    "OnlineKNN": lambda: lc.OnlineKNN(CLASSES, k=2),
    "OnlineKNN, training": lambda: lc.OnlineKNN(CLASSES, k=2, bank="train"),
    "OnlineZeroShot": lambda: lc.OnlineZeroShot(NAMES),
}
"""Callbacks that cannot work without labels."""
LOOKERS = {
    "InstanceDiscriminationMonitor": lambda: lc.InstanceDiscriminationMonitor("backbone", every_n_steps=1),
    "EmbeddingLogger": lambda: lc.EmbeddingLogger("backbone", samples=6),
}
"""Callbacks that show labels if there are any."""


def test_the_tables_name_every_callback_that_has_a_place_for_labels():
    public = [getattr(callbacks, name) for name in callbacks.__all__]
    places = {c.__name__: inspect.signature(c.__init__).parameters.get("labels") for c in public if isinstance(c, type)}
    found = {name for name, place in places.items() if place is not None and place.default is None}
    assert found == {name.split(",")[0] for name in (*READERS, *LOOKERS)}


@layouts
def test_a_batch_of_texts_has_neither_labels_nor_indices(layout):
    batch = LAYOUTS[layout]
    assert split_batch(batch)[1] is batch_labels(batch) is batch_indices(batch) is None
    assert len(batch_texts(batch, "CLIP")) == B
    with pytest.raises(ValueError, match=r"`labels` must be in the batch, got '(images and texts|dict)'\. P needs"):
        find_labels(batch, None, "P")
    assert read_classes(batch, None, "P") is None
    assert batch_texts(transform_images(batch, lambda x: x, list, None), "CLIP") is not None


def test_tokens_after_labels_are_no_indices():
    batch = (IMAGES, LABELS, TOKENS)
    assert batch_labels(batch) is LABELS
    assert batch_indices(batch) is None
    assert batch_texts(batch, "CLIP") is TOKENS
    assert batch_indices((IMAGES, LABELS, LABELS, TOKENS)) is LABELS


def test_labels_of_a_dict_and_several_labels_per_image_are_found():
    several, soft = TOKENS % 2, torch.rand(B, CLASSES)
    assert batch_labels({"image": IMAGES, "text": TOKENS, "label": LABELS}) is LABELS
    assert batch_labels({"image": IMAGES, "label": several}) is several
    assert batch_labels((IMAGES, soft)) is soft
    assert batch_labels((IMAGES, several), rows=True) is several
    assert batch_labels((IMAGES, several > 0)).dtype == torch.bool
    assert batch_labels((IMAGES, WORDS), rows=True) is None


class Pairs(L.LightningModule):
    """Towers with a step that does not look at the texts, so that only callbacks may complain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.text = TinyBackbone(), nn.Embedding(300, 8)

    def forward(self, images):
        return self.backbone(images)

    encode_image = forward

    def encode_text(self, texts):
        return self.text(torch.tensor([len(text) for text in texts]))

    def training_step(self, batch, batch_idx):
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        views = images if isinstance(images, list) else [images, images]
        rows = self.backbone(torch.cat(views))
        return {"loss": rows.square().mean(), "features": rows[: len(rows) // 2].detach()}

    def validation_step(self, batch, batch_idx):
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        return {"features": self(images[0] if isinstance(images, list) else images)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batch):
    return DataLoader([batch, batch], batch_size=None, collate_fn=lambda item: item)


@layouts
@pytest.mark.parametrize("name", READERS)
def test_who_needs_labels_says_that_there_are_none(name, layout):
    with pytest.raises(ValueError, match=r"`labels` must be in the batch, got '(images and texts|dict|tuple|list)'"):
        quiet_fit(Pairs(), [READERS[name]()], loader(LAYOUTS[layout]), loader(LAYOUTS[layout]), max_epochs=1)


@pytest.mark.parametrize("name", [name for name in READERS if "numbers" not in name])
def test_labels_in_a_dict_with_texts_are_used(name):
    batch = {"image": IMAGES, "text": WORDS, "label": LABELS}
    run = quiet_fit(Pairs(), [READERS[name]()], loader(batch), loader(batch), max_epochs=1)
    assert any(key.endswith("top1") for key in run.callback_metrics)


@layouts
@pytest.mark.slow
def test_the_monitor_counts_no_false_negatives_without_labels(layout, tmp_path):
    def logged(batch):
        monitors = [make() for make in LOOKERS.values()]
        settings = {"max_epochs": 1, "default_root_dir": tmp_path}
        return set(quiet_fit(Pairs(), monitors, loader(batch), loader(batch), **settings).callback_metrics)

    without, found = logged(LAYOUTS[layout]), logged({"image": IMAGES, "text": WORDS, "label": LABELS})
    assert found - without == {"contrast/false_negatives", "contrast/false_negatives_chance"}
    assert "contrast/positive_cosine" in without


@layouts
@pytest.mark.parametrize("module", [(lc.SupCon, {}), (lc.SimCLR, {"mask_same": "label"})], ids=["SupCon", "mask_same"])
def test_methods_that_need_labels_say_so(module, layout):
    method, options = module
    views = lc.contracts.replace_images(LAYOUTS[layout], [IMAGES, IMAGES])
    with pytest.raises(ValueError, match="`batch` must hold labels for"):
        run_step(method(TinyBackbone(), warmup_epochs=0, **options), views)


@pytest.mark.parametrize("mask_same", ["label", "index"])
def test_an_image_text_method_finds_its_ids_in_a_dict_only(mask_same):
    module = lc.CLIP(TinyBackbone(), warmup_epochs=0, mask_same=mask_same, **TEXTS)
    for layout in ("words", "words, then classes", "tokens, then classes"):
        with pytest.raises(ValueError, match=r"`batch` must hold (labels|sample indices) for CLIP"):
            run_step(module, LAYOUTS[layout])
    batch = {"image": IMAGES, "text": WORDS, mask_same: LABELS}
    assert torch.isfinite(run_step(module, batch)["loss"])
