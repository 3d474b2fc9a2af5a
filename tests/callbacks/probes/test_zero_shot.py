"""OnlineZeroShot and zero_shot_weights: values by hand, an unchanged run, bad input."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from lightning_contrast.callbacks import OnlineZeroShot
from lightning_contrast.evaluation import zero_shot_weights

NAMES = ("red", "green", "blue", "gray", "pink", "none")


class Towers(L.LightningModule):
    """Texts become the counts of their bytes in 6 bins; images their mean over a linear map."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 6)
        self.drop = torch.nn.Dropout(0.5)
        self.texts = []

    def encode_image(self, images):
        return F.normalize(self.drop(self.layer(images.flatten(1))), dim=1)

    def encode_text(self, texts):
        assert not self.training
        self.texts.append(list(texts))
        counts = [torch.bincount(torch.tensor(list(text.encode())) % 6, minlength=6) for text in texts]
        return 3 * F.normalize(self.drop(torch.stack(counts).float()), dim=1)

    def training_step(self, batch, batch_idx):
        return self.encode_image(batch["image"]).square().sum() + torch.rand(())

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def loader(labels, batch_size=5):
    g = torch.Generator().manual_seed(3)
    images = torch.rand(len(labels), 3, 2, 2, generator=g)
    rows = [{"image": image, "label": label} for image, label in zip(images, torch.tensor(labels), strict=True)]
    return DataLoader(rows, batch_size=batch_size)


def trainer(*callbacks, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", max_epochs=2, logger=False, callbacks=list(callbacks), **quiet, **kwargs)


def test_weights_are_the_mean_of_unit_embeddings_over_the_templates():
    model = Towers().train()
    model.layer.eval()
    found = zero_shot_weights(model, NAMES, ["{}", "a {} thing"], batch_size=5)
    assert [len(texts) for texts in model.texts] == [5, 5, 2]
    modes = [module.training for module in (model, model.drop, model.layer)]
    assert modes == [True, True, False]
    model.eval()
    for row, name in zip(found, NAMES, strict=True):
        parts = [model.encode_text([text])[0] / 3 for text in (name, f"a {name} thing")]
        torch.testing.assert_close(row, F.normalize(parts[0] + parts[1], dim=0))


def test_accuracy_equals_the_argmax_by_hand_without_unlabeled_images():
    torch.manual_seed(0)
    model, labels = Towers(), [0, 1, 2, 3, 4, 5, 0, 1, -1, 2, 3, -1, 4]
    probe = OnlineZeroShot(NAMES, templates=["a {}"])
    run = trainer(probe)
    logged = run.validate(model, loader(labels), verbose=False)[0] | run.test(model, loader(labels), verbose=False)[0]
    assert len(model.texts) == 2  # the texts are encoded once in each evaluation
    model.eval()
    images = torch.stack([row["image"] for row in loader(labels).dataset])
    order = (model.encode_image(images) @ zero_shot_weights(model, NAMES, ["a {}"]).T).argsort(1, descending=True)
    known = [i for i, label in enumerate(labels) if label >= 0]
    for rank in (1, 5):
        expected = sum(labels[i] in order[i, :rank].tolist() for i in known) / len(known)
        assert logged[f"zero_shot/top{rank}"] == logged[f"zero_shot/test_top{rank}"] == pytest.approx(expected)
    assert 0 < logged["zero_shot/top1"] < 1


def test_the_run_is_unchanged():
    weights = []
    for probes in ([], [OnlineZeroShot(NAMES), OnlineZeroShot(NAMES, name="other")]):
        L.seed_everything(1, verbose=False)
        model = Towers()
        run = trainer(*probes)
        run.fit(model, loader([0, 1, 2, 3, 4, 5]), loader([0, 1, 2]))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
        if probes:
            assert {"zero_shot/top1", "other/top1"} <= run.callback_metrics.keys()
    assert torch.equal(*weights)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"`class_names` must be different.*got \['cat'\]"):
        OnlineZeroShot(["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="`class_names` must hold no empty name"):
        OnlineZeroShot(["cat", ""])
    with pytest.raises(ValueError, match="`class_names` must hold at least 2"):
        OnlineZeroShot(["cat"])
    with pytest.raises(TypeError, match="`class_names` must be a list of strings"):
        OnlineZeroShot("cat")
    with pytest.raises(ValueError, match=r"`templates` must have \{\} once in each sentence, got 'a photo'"):
        OnlineZeroShot(["cat", "dog"], templates=["a photo"])
    with pytest.raises(TypeError, match="`model` must have a method `encode_text`, got 'Linear'"):
        zero_shot_weights(torch.nn.Linear(1, 1), ["cat", "dog"])
    with pytest.raises(ValueError, match=r"-?\d+ .*classes|labels"):
        trainer(OnlineZeroShot(["cat", "dog"])).validate(Towers(), loader([0, 2]), verbose=False)
    with pytest.raises(TypeError, match="`pl_module` must have a method `encode_text`"):
        trainer(OnlineZeroShot(["cat", "dog"])).validate(BoringModel(), verbose=False)
    with pytest.raises(ValueError, match="`name` must differ"):
        trainer(OnlineZeroShot(["cat", "dog"]), OnlineZeroShot(["cat", "dog"])).validate(
            Towers(), loader([0]), verbose=False
        )
