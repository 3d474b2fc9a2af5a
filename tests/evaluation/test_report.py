"""The report card: values, files, determinism, resume, ranks, failures and the page."""

import dataclasses
import importlib.machinery
import json
import os
import re
import shutil
import signal
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast import evaluation as ev
from lightning_contrast.augment import CORRUPTIONS, HELD_OUT_CORRUPTIONS
from lightning_contrast.augment.images import as_float
from lightning_contrast.callbacks.invariance.perturbations import CHANGES
from lightning_contrast.cli import main
from lightning_contrast.evaluation.feature_pass.subjects import spec_transform
from lightning_contrast.evaluation.report_card import PARTS, build, cost, dense, figures, shifts
from lightning_contrast.evaluation.report_card.figures import LAYOUTS
from lightning_contrast.evaluation.report_card.page import number
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean
from lightning_contrast.export import export
from lightning_contrast.metrics import cka
from lightning_contrast.nn import build_backbone
from tests.launch import ChildError, run_processes
from tests.tolerances import near, near64

FAST = {"corrupted_images": 8, "severities": (1, 5), "view_images": 8, "views": 2, "sweep_steps": 0, "max_iter": 20}
FAST |= {"grid_steps": 20, "pictures": 16, "scenes": 8, "segmentation_steps": 3, "detection_steps": 1}
FAST |= {"tuned_test_images": 20, "attacked_images": 8, "attack_steps": 2}
FAST |= {"shortcut_train_images": 60, "shortcut_test_images": 30, "cue_images": 20}
QUICK = ("knn", "retrieval", "geometry")


class Data(L.LightningDataModule):
    """Squares in three colors and three places, with noise; the label is the color."""

    class_names = ("red", "green", "blue")
    contrast = 120

    def __init__(self, count: int = 120, labels: bool = True, columns: bool = False) -> None:
        super().__init__()
        self.count, self.labels, self.columns = count, labels, columns

    def make(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        labels, places = torch.arange(count) % 3, torch.randint(0, 3, (count,), generator=g)
        images = torch.randint(0, 60, (count, 3, 16, 16), dtype=torch.uint8, generator=g)
        for image, label, place in zip(images, labels, places, strict=True):
            image[label, 2:14, 5 * place : 5 * place + 5] += self.contrast
        return images, labels, places

    def loader(self, count, seed, **options):
        images, labels, places = self.make(count, seed)
        if self.columns:
            rows = [
                {"image": image, "label": label, "place": place, "id": row}
                for row, (image, label, place) in enumerate(zip(images, labels, places, strict=True))
            ]
            return DataLoader(rows, 20, **options)
        return DataLoader(TensorDataset(images, labels) if self.labels else TensorDataset(images), 20, **options)

    def train_dataloader(self):
        return self.loader(self.count, 0, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return self.loader(66, 1)


class DescribedData(Data):
    """The same with masks, groups and pairs."""

    def split(self, name):
        return self.make(*{"train": (self.count, 0), "val": (66, 1)}[name])

    def masks(self, split):
        return self.split(split)[0].amax(1) > 115

    def image_groups(self, split):
        return {"half": torch.arange(len(self.split(split)[1])) % 2}

    def twins(self, split):
        first = torch.arange(0, len(self.split(split)[1]) - 3, 12)
        return first, first + 3  # the same class


class Pool(nn.Module):
    """Mean colors of cells, seen through a random layer."""

    def __init__(self, seed=0, width=12):
        super().__init__()
        torch.manual_seed(seed)
        self.cells, self.layer = nn.AdaptiveAvgPool2d(4), nn.Linear(48, width)

    def forward(self, images):
        return self.layer(self.cells(images).flatten(1))


class Blind(nn.Module):
    """Features that say nothing."""

    def forward(self, images):
        return images[:, :1, :2, :2].flatten(1)


def models():
    return {"pool": Pool(), "blind": Blind()}


def card(folder, *, of=None, data=None, parts=QUICK, **options):
    options |= {"parts": parts, "options": FAST, "progress": False}
    return ev.report(of or models(), data or Data(), output=folder, **options)


def all_parts(folder):
    return card(folder, parts="all", data=DescribedData(columns=True), transfer={"small": Data(count=60)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report with all parts, and its folder."""
    folder = tmp_path_factory.mktemp("report")
    return all_parts(folder), folder


@pytest.mark.slow
def test_every_part_has_values_of_every_model(whole):
    found, _ = whole
    assert found.errors == {}
    assert set(found.outcomes) == set(PARTS)
    for part, outcomes in found.outcomes.items():
        assert list(outcomes) == ["pool", "blind"], part
        fits = {"segmentation": ["pool"], "detection": ["pool"], "attention": []}.get(part, ["pool", "blind"])
        assert [name for name, outcome in outcomes.items() if outcome.values] == fits, part
        assert all(outcome.values or "Not judged" in outcome.notes[0] for outcome in outcomes.values()), part
        headline = PARTS[part].headline.replace("5-way", "3-way")
        assert not headline or all(any(n.startswith(headline) for n in outcomes[name].values) for name in fits), part


@pytest.mark.slow
def test_values_are_those_of_the_protocols(whole):
    found, folder = whole
    data = Data()
    features = {
        name: ev.cached_features(models()["pool"], loader, folder=folder / "other", progress=False)
        for name, loader in (("train", data.train_dataloader()), ("test", data.val_dataloader()))
    }
    train, test = features["train"], features["test"]
    given = (train.features, train.labels, test.features, test.labels)
    rows = {(row["part"], row["metric"], row["model"]): row for row in found.table()}
    knn = ev.knn_top1(*given, num_classes=3, k=20)
    row = rows["knn", "top1 (k = 20)", "pool"]
    assert row["value"] == near(knn)
    assert row["low"] <= row["value"] <= row["high"]
    assert rows["retrieval", "mAP", "pool"]["value"] == near64(ev.label_retrieval(*given[2:])["map"])
    assert rows["geometry", "effective rank", "pool"]["value"] == near64(ev.geometry(test.features)["effective_rank"])
    assert rows["clusters", "NMI", "pool"]["value"] == near64(ev.cluster_scores(*given[2:])["nmi"])
    assert rows["cost", "parameters", "pool"]["value"] == 48 * 12 + 12
    assert rows["cost", "GFLOPs per image", "pool"]["value"] == near64(2 * 48 * 12 / 1e9)
    assert "worst place" in {metric for _, metric, _ in rows}
    right = ev.logistic_probe(*given, c=0.1, standardize=True).logits.argmax(1) == test.labels
    worst = ev.worst_group_accuracy(right, DescribedData().image_groups("val")["half"])
    assert rows["groups", "worst half", "pool"]["value"] == near64(worst["accuracy"])
    assert "id: no group has 5 test images." in found.outcomes["groups"]["pool"].notes
    blind = ev.cached_features(models()["blind"], data.val_dataloader(), folder=folder / "other", progress=False)
    both = float(cka(test.features, blind.features, unbiased=True))
    assert rows["similarity", "CKA with blind", "pool"]["value"] == near64(both)


@pytest.mark.slow
def test_parts_of_shifts_are_those_of_the_protocols(whole):
    found, folder = whole
    data, model = DescribedData(), models()["pool"]
    train, test = (
        ev.cached_features(model, loader, folder=folder / "other", progress=False)
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    given = (train.features, train.labels, test.features, test.labels)
    values = {part: found.outcomes[part]["pool"].values for part in found.outcomes}
    tail = ev.long_tail(*given)["result"]
    assert values["long_tail"]["top1 (mean of images)"] == near64(tail.top1)
    halves = [data.image_groups(split)["half"] for split in ("train", "val")]
    left_out = ev.unseen_groups(*given[:2], halves[0], *given[2:], halves[1])
    assert values["unseen_groups"]["half 1, unseen"] == near64(left_out[1]["unseen"].top1)
    assert values["unseen_groups"]["half 1, seen"] == near64(left_out[1]["seen"].top1)
    assert "place 2, unseen" in values["unseen_groups"]  # a column of the batches
    gaps = [left_out[group][key].top1 * 33 for key in ("seen", "unseen") for group in (0, 1)]
    assert values["unseen_groups"]["lost on unseen half"] == near64((sum(gaps[:2]) - sum(gaps[2:])) / 66, size=1)
    images, labels, _ = data.split("val")
    rows, held = ev.fine_tune_rows(train.labels, share=0.1)
    pictures, classes, _ = data.split("train")
    places = [place * 66 // 20 for place in range(20)]
    tuned = ev.fine_tune(
        *(model, pictures[rows], classes[rows], images[places], labels[places]),
        validation=(pictures[held], classes[held]),
        share=0.1,
    )
    assert values["fine_tuning"]["top1 with 10% of the labels (12)"] == near64(tuned.top1)
    places = [place * 66 // 8 for place in range(8)]
    head = ev.logistic_head(*given[:2])
    robust = ev.pgd_robustness(model, head, images[places], labels[places], epsilon=8 / 255, steps=2)
    assert values["attacks"]["robust accuracy (8/255)"] == near64(robust["robust"].double().mean().item())
    first, second = data.twins("val")
    audit = ev.twin_retrieval(test.features, test.labels, first, second)
    assert values["bias"]["mAP of first"] == near64(audit["first"].mean().item())
    assert values["transfer"]["small, linear top1"] == values["transfer"]["mean linear top1"]


def test_other_data_are_judged_by_the_features_of_each_model(whole):
    found, folder = whole
    small = Data(count=60)
    for name, model in models().items():
        train, test = (
            ev.cached_features(model, loader, folder=folder / "other", progress=False)
            for loader in (small.train_dataloader(), small.val_dataloader())
        )
        given = (train.features, train.labels, test.features, test.labels)
        values = found.outcomes["transfer"][name].values
        assert values["small, linear top1"] == near64(ev.logistic_sweep(*given, steps=0, max_iter=20).top1)
        assert values["small, k-NN top1 (k = 20)"] == near64(ev.knn_sweep(*given, k=(20,))[20, 0.07].top1)


def test_invariance_is_the_cosine_of_centered_features(whole):
    found, _ = whole
    images = as_float(Data().make(66, 1)[0][[place * 66 // 8 for place in range(8)]])
    outcome = found.outcomes["invariance"]["pool"]
    assert list(outcome.curves) == [caption for caption, _ in found.figures["invariance"]] == list(CHANGES)
    signs = torch.tensor([1.0, -1.0] * 4).view(-1, 1, 1, 1)
    by_hand = {
        "flip": [(1.0, images.flip(-1))],
        "brightness": [(s, (images * (1 + s * signs)).clamp(0, 1)) for s in (0.2, 0.4, 0.6, 0.8)],
    }
    with torch.no_grad():
        mean = models()["pool"](images).mean(0)
        original = models()["pool"](images) - mean
        for name, changed in by_hand.items():
            others = [models()["pool"](x) - mean for _, x in changed]
            line = [nn.functional.cosine_similarity(original, other).mean().item() for other in others]
            assert [strength for strength, _ in outcome.curves[name]] == [strength for strength, _ in changed]
            assert [value for _, value in outcome.curves[name]] == near(line)
            assert outcome.values[name] == near(sum(line) / len(line))
    means = [value for name, value in outcome.values.items() if name != "mean"]
    assert outcome.values["mean"] == near64(sum(means) / len(means))
    for _, picture in found.figures["invariance"]:
        assert ">pool<" in picture
        assert ">blind<" in picture


class Detached(Pool):
    """Has no gradient in the images."""

    def forward(self, images):
        return super().forward(images).detach()


@pytest.mark.slow
def test_a_model_has_one_color_in_all_figures(tmp_path):
    found = card(tmp_path, parts=("knn", "attacks"), of={"detached": Detached(), "pool": Pool()})
    assert "must be differentiable in the images" in found.errors["attacks"]["detached"]
    for part, seen in (("knn", (True, True)), ("attacks", (False, True))):
        assert tuple(color in found.figures[part][0][1] for color in figures.COLORS[:2]) == seen


def test_layers_are_drawn_in_their_order(monkeypatch):
    monkeypatch.setattr(figures, "svg", lambda figure: figure)
    plot = figures.layers({"stem": [(0, 1.0), (1, 0.2)], "constant": [], "output": [(0, 0.2), (2, 0.9)]}).axes[0]
    drawn = plot.images[0]
    assert drawn.origin == "lower"
    assert drawn.get_clim() == (0, 1)
    assert drawn.get_array().filled(-1).tolist() == [[1.0, 0.2, -1.0], [-1.0] * 3, [0.2, -1.0, 0.9]]
    for ticks in (plot.get_xticklabels(), plot.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["stem", "constant", "output"]


@pytest.mark.slow
def test_the_seed_of_a_part_does_not_depend_on_the_other_parts(tmp_path, monkeypatch):
    def run(context, model):
        return Outcome({"drawn": float(torch.rand(()))})

    monkeypatch.setitem(PARTS, "geometry", dataclasses.replace(PARTS["geometry"], run=run))
    of = {"pool": Pool()}
    alone, second = (card(tmp_path / str(len(parts)), of=of, parts=parts) for parts in (("geometry",), QUICK))
    assert alone.outcomes["geometry"]["pool"].values == second.outcomes["geometry"]["pool"].values


def test_parts_say_that_they_do_not_apply(tmp_path):
    found = card(tmp_path, parts=("unseen_groups", "cue_conflict", "bias", "shortcut"), of={"pool": Pool()})
    assert found.errors == {}
    for part, name in (("unseen_groups", "image_groups"), ("cue_conflict", "masks"), ("bias", "twins")):
        outcome = found.outcomes[part]["pool"]
        assert outcome.values == {}
        assert f"Does not apply: the DataModule has no `{name}(split)`" in outcome.notes[0]
        assert "Does not apply" in (tmp_path / "report.html").read_text()
    assert "tag swapped" in found.outcomes["shortcut"]["pool"].values
    assert "background swapped" not in found.outcomes["shortcut"]["pool"].values


@pytest.mark.slow
def test_other_data(tmp_path):
    other, bare = Data(count=60), Data(labels=False)
    found = card(tmp_path, parts=("transfer",), of={"pool": Pool()}, transfer={"other": other, "bare": bare})
    outcome = found.outcomes["transfer"]["pool"]
    assert set(outcome.values) == {"mean linear top1", "other, linear top1", "other, k-NN top1 (k = 20)"}
    assert any(note.startswith("Failed for bare: `train_labels` must be given") for note in outcome.notes)
    swept = card(tmp_path / "alone", parts=("linear",), data=Data(count=60), of={"pool": Pool()})
    assert outcome.values["other, linear top1"] == swept.outcomes["linear"]["pool"].values["top1"]
    again = card(tmp_path, parts=("transfer",), of={"pool": Pool()}, transfer={"other": Data(count=40)})
    assert any("other: 40 training" in note for note in again.outcomes["transfer"]["pool"].notes)  # not the kept one
    none = card(tmp_path / "none", parts=("transfer", "knn"), of={"pool": Pool()})
    assert "`transfer` must hold DataModules" in none.errors["transfer"]["pool"]
    default = ev.report(
        {"pool": Pool()},
        Data(count=60),
        output=tmp_path / "d",
        parts=None,
        options=FAST,
        transfer={"o": other},
        progress=False,
    )
    assert "transfer" in default.outcomes
    assert "fine_tuning" not in default.outcomes
    with pytest.raises(TypeError, match="`transfer` must be a dict"):
        card(tmp_path, transfer=[other])


class Missing(Data):
    """Its files are not there."""

    def __init__(self, file, **options):
        super().__init__(**options)
        self.file = file

    def setup(self, stage):
        if not self.file.exists():
            raise FileNotFoundError(f"No images in {self.file.name}")


@pytest.mark.slow
def test_other_data_that_cannot_be_read_are_named(tmp_path):
    given = {"parts": ("transfer", "knn"), "of": {"pool": Pool()}}
    gone = Missing(tmp_path / "file", count=60)
    alone = card(tmp_path / "alone", transfer={"gone": gone}, **given)
    assert "No images in file" in alone.errors["transfer"]["pool"]
    assert "pool" in alone.outcomes["knn"]
    for count in (60, 40):  # of the second, no kept table of the first
        found = card(tmp_path / "both", transfer={"gone": gone, "other": Data(count=count)}, **given)
        notes = found.outcomes["transfer"]["pool"].notes
        assert "Failed for gone: No images in file" in notes
        assert any(f"other: {count} training" in note for note in notes)
    gone.file.touch()
    make = gone.make
    gone.make = lambda count, seed: (make(count, seed)[0], torch.arange(count) * 3 // count, None)  # not the colors
    found = card(tmp_path / "both", transfer={"gone": gone, "other": Data(count=40)}, **given)
    values = found.outcomes["transfer"]["pool"].values
    both = values["gone, linear top1"], values["other, linear top1"]
    assert both[0] != both[1]
    assert values["mean linear top1"] == near64(sum(both) / 2)


@pytest.mark.parametrize("part", ["segmentation", "attention", "detection", "transfer"])
def test_a_full_memory_says_nothing_about_a_model(part, tmp_path, monkeypatch):
    given = {"parts": (part,), "of": {"pool": Pool()}, "transfer": {"other": Data(count=60)}}

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for module, name in ((dense, "_scenes"), (shifts, "cached_features")):
        monkeypatch.setattr(module, name, full)
    found = card(tmp_path, **given)
    assert found.errors[part]["pool"] == "OutOfMemoryError: CUDA out of memory"
    assert not list((tmp_path / "parts").glob("*"))


class HalfLabeled(DescribedData):
    """The first images have no label."""

    def make(self, count, seed):
        images, labels, places = super().make(count, seed)
        labels[: count // 3] = -1
        return images, labels, places


@pytest.mark.slow
def test_unlabeled_images_are_no_part_of_what_is_learned_or_judged(tmp_path):
    data, model = HalfLabeled(), Pool()
    parts = ("fine_tuning", "long_tail", "unseen_groups", "attacks", "shortcut", "cue_conflict")
    found = card(tmp_path, parts=parts, data=data, of={"pool": model})
    assert found.errors == {}
    (images, labels, _), (others, classes, _) = data.split("train"), data.split("val")
    images, labels, others, classes = images[40:], labels[40:], others[22:], classes[22:]
    rows, held = ev.fine_tune_rows(labels, share=0.1)
    places = [place * 44 // 20 for place in range(20)]
    tuned = ev.fine_tune(
        *(model, images[rows], labels[rows], others[places], classes[places]),
        validation=(images[held], labels[held]),
        share=0.1,
    )
    values = found.outcomes["fine_tuning"]["pool"].values
    assert values[f"top1 with 10% of the labels ({len(rows)})"] == near64(tuned.top1)
    places = [place * 44 // 30 for place in range(30)]
    learned = [place * 80 // 60 for place in range(60)]
    shown = ev.shortcut_test(
        lambda given: model(given).detach(), images[learned], labels[learned], others[places], classes[places]
    )
    value = found.outcomes["shortcut"]["pool"].values["tag swapped"]
    assert value == near64(shown["swapped"].double().mean().item())


def test_masks_of_other_sizes_are_named(tmp_path):
    data = DescribedData()
    data.masks = lambda split: torch.ones(3, 16, 16, dtype=torch.bool)
    found = card(tmp_path, parts=("cue_conflict",), data=data, of={"pool": Pool()})
    assert "`datamodule.masks` must return a tensor of 66 rows, got 3" in found.errors["cue_conflict"]["pool"]


@pytest.mark.slow
def test_a_model_that_sees_is_better_than_one_that_does_not(whole):
    found, _ = whole
    rows = {(row["part"], row["metric"]): row for row in found.compare("pool", "blind")}
    row = rows["knn", "top1 (k = 20)"]
    assert row["verdict"] == "pool"
    assert row["mcnemar_p"] < 0.01
    assert 0 < row["low"] <= row["difference"] <= row["high"]
    same = ev.paired_bootstrap(
        found.outcomes["knn"]["pool"].per_image["top1 (k = 20)"],
        found.outcomes["knn"]["blind"].per_image["top1 (k = 20)"],
    )
    assert row["difference"] == near64(same["difference"])
    fooled = rows["shortcut", "taken for the tag"]
    assert fooled["verdict"] == (
        "noise" if fooled["mcnemar_p"] >= 0.05 else "pool" if fooled["difference"] < 0 else "blind"
    )
    assert rows["calibration", "Brier score"]["difference"] < 0
    assert rows["calibration", "Brier score"]["verdict"] == "pool"  # lower is better
    assert {row["verdict"] for row in found.compare("pool", "pool")} == {"noise"}
    with pytest.raises(ValueError, match="`model` must be one of 'pool', 'blind'"):
        found.compare("pool", "bling")


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(tmp_path, whole):
    _, folder = whole
    all_parts(tmp_path / "again")
    for name in ("report.json", "report.md"):
        first, second = ((path / name).read_bytes() for path in (folder, tmp_path / "again"))
        assert name == "report.md" or first == second
    other = card(tmp_path / "other", parts=("few_shot",), seed=1)
    assert json.loads((tmp_path / "other" / "report.json").read_text())["seed"] == 1
    third = card(tmp_path / "third", parts=("few_shot",))
    assert other.outcomes["few_shot"]["pool"].values != third.outcomes["few_shot"]["pool"].values


class FaintData(Data):
    """Colors that corruptions hide."""

    contrast = 8


@pytest.mark.slow
def test_the_corruption_error_is_relative_to_the_reference(tmp_path):
    found = card(tmp_path, parts=("corruptions",), data=FaintData(), reference="blind")
    assert list(found.outcomes["corruptions"]) == ["blind", "pool"]
    values = {name: outcome.values for name, outcome in found.outcomes["corruptions"].items()}
    assert values["blind"]["mCE against blind (%)"] == near64(100.0)
    names = [name.replace("_", " ") for name in CORRUPTIONS]
    ratios = [(1 - values["pool"][name]) / (1 - values["blind"][name]) for name in names]
    assert values["pool"]["mCE against blind (%)"] == near64(100 * sum(ratios) / len(ratios))
    mean = sum(values["pool"][name] for name in names) / len(names)
    assert values["pool"]["mean accuracy"] == near64(mean)
    data, model = FaintData(), Pool()
    train = ev.cached_features(model, data.train_dataloader(), folder=tmp_path / "other", progress=False)
    head, (images, labels, _) = ev.logistic_head(train.features, train.labels), data.make(66, 1)
    chosen = [place * 66 // 8 for place in range(8)]
    direct = ev.corruption_robustness(
        lambda given: head(model(as_float(given))), images[chosen], labels[chosen], severities=FAST["severities"]
    )
    clean = direct.pop("clean").double().mean().item()
    by_severity = torch.stack([*direct.values()]).double().mean((0, 2))
    curve = found.outcomes["corruptions"]["pool"].curves["accuracy by severity"]
    assert curve == [(0, near64(clean)), (1, near64(by_severity[0].item())), (5, near64(by_severity[1].item()))]
    assert values["pool"]["fog"] == near64(direct["fog"].double().mean().item())
    assert values["pool"]["clean accuracy"] == near64(clean)
    assert values["pool"]["accuracy lost"] == near64(clean - mean)
    both = {"parts": ("corruptions",), "progress": False, "options": FAST | {"held_out_corruptions": True}}
    found = ev.report(models(), FaintData(), output=tmp_path, reference="blind", **both)
    more = found.outcomes["corruptions"]["pool"].values
    assert {name: more[name] for name in values["pool"]} == values["pool"]
    others = sum(more[name.replace("_", " ")] for name in HELD_OUT_CORRUPTIONS) / 4
    assert more["mean accuracy, held-out corruptions"] == near64(others)
    assert len({clean, mean, others, *by_severity.tolist()}) == 5  # told apart by the lines above
    assert more.keys() - values["pool"].keys() == {
        "mean accuracy, held-out corruptions",
        *(name.replace("_", " ") for name in HELD_OUT_CORRUPTIONS),
    }


def test_a_missing_corruption_error_is_explained(tmp_path):
    data = Data()

    def make(count, seed):
        classes = torch.arange(count) % 3
        return (80 * classes).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 16, 16), classes, classes

    data.make = make
    found = card(tmp_path, parts=("corruptions",), data=data, of={"pool": Pool()}).outcomes["corruptions"]["pool"]
    assert found.values["pixelate"] == 1  # of images of one color
    assert "mCE against pool (%)" not in found.values
    assert any(note.startswith("No mCE: pool") for note in found.notes)


class Page(HTMLParser):
    """Collects the tags of a page, and checks that they are closed in order."""

    VOID = ("meta", "link", "br", "image", "path", "use", "rect", "circle", "line", "polygon")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.texts = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.addresses += [given[name] for name in ("href", "src", "xlink:href") if name in given]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_one_file_that_needs_no_network(whole):
    found, folder = whole
    text = (folder / "report.html").read_text()
    assert len(text) < 5e6
    page = Page()
    page.feed(text)
    assert page.open == []
    inner = [address for address in page.addresses if not address.startswith(("#", "data:"))]
    assert inner == []
    assert not re.findall(r"url\((?!#|\"?data:)", text)
    assert not re.findall(r"@import|<script[^>]+src|fetch\(", text)
    assert {"summary", "comparisons", "pictures", *PARTS} <= page.ids
    words = " ".join(page.texts)
    for part in PARTS.values():
        assert part.title in words
        assert part.meaning in words
    for row in found.table():
        assert number(row["value"]) in words
    for caption in ("brightness", "accuracy by severity"):
        assert caption in words
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


class Meter:
    """Stands in for the energy meter: 0.5 Wh."""

    def take(self):
        return 5e-4

    def stop(self):
        self.stopped = True


def test_memory_and_energy_are_measured_and_not_in_the_json(tmp_path, monkeypatch):
    package = types.ModuleType("codecarbon")  # not among the packages of the tests
    package.__spec__ = importlib.machinery.ModuleSpec("codecarbon", None)
    monkeypatch.setitem(sys.modules, "codecarbon", package)
    monkeypatch.setattr(cost, "EnergyMeter", Meter)
    monkeypatch.setattr(cost, "_ENERGY_SECONDS", 0.0)  # one pass
    monkeypatch.setattr(cost, "_pass_seconds", lambda subject, inputs: 0.5)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    given = {"parts": ("cost",), "options": FAST | {"energy": True}, "progress": False}
    found = ev.report({"net": net}, Data(), output=tmp_path, **given).outcomes["cost"]["net"]
    monkeypatch.undo()
    pixels = 64 * 16 * 16
    tensors = 3 * pixels + 8 * 3 * 9 + 8 + 8 * pixels + 64 * 8  # images, weights, the map, its mean
    assert found.measured["peak memory of a pass of 64 images in MiB"] == near64(4 * tensors / 2**20)
    assert found.measured["images per second"] == near64(64 / 0.5)
    assert found.measured["Wh per 1,000 images (estimate)"] == near64(0.5 * 1000 / 64)
    assert found.measured["g of CO2 per 1,000 images (estimate)"] == near64(473 * 5e-4 * 1000 / 64)
    text = (tmp_path / "report.json").read_text()
    assert not [name for name in found.measured if name in text]
    assert set(json.loads((tmp_path / "measured.json").read_text())["cost"]["net"]) == set(found.measured)
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs codecarbon.*pip install 'lightning_contrast\[energy\]'"):
        ev.report({"net": net}, Data(), output=tmp_path, **given)


def test_memory_on_an_accelerator_is_that_of_one_model(monkeypatch):
    """Of a device that holds 1000 bytes of other models, the weights and the inputs before the pass, 700 more in it."""
    model = nn.Linear(5, 3)
    inputs = types.SimpleNamespace(device=torch.device("cuda"), nbytes=40)
    before = 1000 + inputs.nbytes + 4 * (15 + 3)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: before)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: before + 700)
    monkeypatch.setattr(model, "forward", lambda given: None)
    subject = types.SimpleNamespace(module=model)
    assert cost._peak_mib(subject, inputs) * 2**20 == near64(40 + 4 * 18 + 700)


def test_maps_place_every_image_and_name_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    given = {"parts": ("knn",), "options": FAST | {"maps": ("UMAP", "t-SNE")}, "progress": False}
    found = ev.report({"pool": Pool()}, Data(), output=tmp_path, **given)
    assert [caption for caption, _ in found.figures["pictures"]] == [
        f"{name} of pool" for name in ("Map (t-SNE)", "Neighbors", "Confusion")
    ]
    assert set(re.findall(r'href="#image-(\d+)"', found.figures["pictures"][0][1])) == {*map(str, range(16))}
    text = (tmp_path / "report.html").read_text().replace("&#39;", "'")
    assert "No Map (UMAP) of pool" in text
    assert "pip install 'lightning_contrast[umap]'" in text
    assert len(re.findall(r'id="image-\d+"', text)) == 16
    with pytest.raises(ValueError, match="`maps` must be one of 't-SNE', 'UMAP'"):
        ev.report({"pool": Pool()}, Data(), output=tmp_path, options={"maps": ["PCA"]})


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:n_jobs value:UserWarning", "ignore::DeprecationWarning")
def test_maps_keep_what_is_near_near_and_repeat(name):
    pytest.importorskip({"UMAP": "umap"}.get(name, "sklearn"))
    features = torch.randn(40, 8).mul(0.1).add(torch.eye(8)[:2].repeat_interleave(20, 0)).double().numpy()
    places = torch.from_numpy(LAYOUTS[name](features, 3)).double()
    assert torch.equal(places, torch.from_numpy(LAYOUTS[name](features, 3)).double())
    distances = torch.cdist(places, places).fill_diagonal_(torch.inf)
    assert bool(((distances.argmin(1) < 20) == (torch.arange(40) < 20)).all())


def test_the_interval_of_a_share_of_none_has_a_width():
    outcome = Outcome()
    for name, share in (("none", 0), ("all", 1)):
        add_mean(outcome, name, torch.full((128,), bool(share)), 0)
        assert outcome.values[name] == share
    z = 1.959963984540054  # Wilson's interval of 0 of 128
    edge = z**2 / (128 + z**2)
    assert list(outcome.intervals["none"]) == near64([0, edge], size=1.0)
    assert list(outcome.intervals["all"]) == near64([1 - edge, 1], size=1.0)


def test_notes_of_all_models_are_written_once(whole):
    _, folder = whole
    text = (folder / "report.html").read_text()
    assert text.count("Operations count multiplications") == 1
    assert len(re.findall("<b>(pool|blind)</b>: [^<]*dimensions are in use", text)) == 2  # of each model its own


def test_names_are_escaped(tmp_path):
    card(tmp_path, of={"<b>x</b>": Pool()}, parts=("knn",))
    text = (tmp_path / "report.html").read_text()
    assert "<b>x</b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text


def test_the_card_is_markdown_with_a_front_matter(whole):
    _, folder = whole
    lines = (folder / "report.md").read_text().splitlines()
    assert lines[0] == "---"
    table = [line for line in lines if line.startswith("| Nearest neighbors")]
    assert table
    assert table[0].count("|") == 4
    start = lines.index(table[0])
    assert {line.count("|") for line in lines[start - 2 : start + 3]} == {4}


class Raises(nn.Module):
    """Raises an error."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, images):
        raise self.error


@pytest.mark.parametrize("error", [AssertionError("size"), AttributeError("size"), KeyError("size"), Exception("size")])
@pytest.mark.slow
def test_any_error_of_a_model_is_named_and_does_not_stop_the_others(error, tmp_path):
    found = card(tmp_path / "all", parts=("knn",), of={"pool": Pool(), "broken": Raises(error)})
    assert "size" in found.errors["features"]["broken"]
    assert "pool" in found.outcomes["knn"]
    with pytest.raises(ValueError, match=r"`models` must include one that can be evaluated, got 'broken'.*size"):
        card(tmp_path / "none", of={"broken": Raises(error)})
    part = PARTS["knn"]

    def run(context, model):
        raise error

    changed = dict(PARTS, knn=dataclasses.replace(part, run=run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PARTS", changed)
        found = card(tmp_path / "part", parts=("knn", "retrieval"))
    assert "size" in found.errors["knn"]["pool"]
    assert set(found.outcomes["retrieval"]) == {"pool", "blind"}


class Classes(Data):
    """With other labels in the training (0) or in the test images (1)."""

    def __init__(self, change, **options):
        super().__init__(**options)
        self.change = change

    def make(self, count, seed):
        images, labels, places = super().make(count, seed)
        return images, self.change(labels, seed), places


LABELED = ("knn", "linear", "grid", "few_shot", "label_efficiency", "retrieval", "clusters", "calibration", "conformal")
LABELED += ("groups", "fine_tuning", "long_tail", "unseen_groups", "anomalies", "corruptions", "attacks", "shortcut")


@pytest.mark.parametrize(
    ("change", "message", "parts"),
    [
        (lambda labels, seed: labels * 0, "must hold two classes or more, got 'only class 0'", LABELED),
        (lambda labels, seed: labels * (1 - seed), "must hold two classes or more", ("clusters", "anomalies")),
        (
            lambda labels, seed: labels.float(),
            r"must be integers of shape \(120,\), got '\(120,\) torch.float32'",
            LABELED,
        ),
        (lambda labels, seed: labels * 0 - 1, "must have labeled rows, got 'none'", LABELED),
    ],
)
def test_labels_that_a_part_cannot_use_are_named(change, message, parts, tmp_path):
    found = card(tmp_path, parts=parts, data=Classes(change), of={"pool": Pool()})
    for part in parts:
        assert re.search(message, found.errors[part]["pool"]), (part, found.errors)


@pytest.mark.slow
def test_a_part_that_fails_is_named_and_does_not_stop_the_others(tmp_path):
    found = card(tmp_path, parts=("few_shot", "knn"), data=Data(count=60), of={"pool": Pool(), "maps": nn.Identity()})
    assert list(found.models) == ["pool"]
    assert "`model` must return features (B, F)" in found.errors["features"]["maps"]
    data = Data()
    data.val_dataloader = lambda: data.loader(30, 1)
    found = card(tmp_path / "few", parts=("few_shot", "knn"), data=data)
    assert "`shots` must leave 15 queries of 10 images" in found.errors["few_shot"]["pool"]
    assert "pool" in found.outcomes["knn"]
    text = (tmp_path / "few" / "report.html").read_text()
    assert "Failed for pool: `shots` must leave 15 queries of 10 images" in text.replace("&#39;", "'")
    assert "shots" in json.loads((tmp_path / "few" / "report.json").read_text())["parts"]["few_shot"]["errors"]["pool"]


CHANGING = ("corruptions", "invariance", "geometry", "fine_tuning", "attacks", "shortcut")


@pytest.mark.parametrize("wide", ["loader", "model"])
def test_parts_that_change_images_refuse_other_ranges(wide, tmp_path):
    """Views and corruptions are in 0..1: of pixels in 0..1000 they would be white, and of a wide scale black."""
    data, model = Data(), Pool()
    if wide == "loader":
        plain = data.loader

        def loader(*args, **options):
            found = plain(*args, **options)
            return DataLoader([(image.float() * 4, *rest) for image, *rest in found.dataset], found.batch_size)

        data.loader = loader
    else:
        model.input_spec = {"size": 16, "mean": None, "std": None, "scale": [0, 1000]}
    found = card(tmp_path, parts=("knn", *CHANGING), data=data, of={"pool": model}, preprocess={"pool": as_float})
    assert "knn" not in found.errors
    assert all("0..1" in found.errors[part]["pool"] for part in CHANGING)


@pytest.mark.slow
def test_a_preprocess_for_uint8_only_is_named(tmp_path):
    """Divided by 255 twice, images are black."""
    given = {"parts": ("knn", *CHANGING), "of": {"pool": Pool()}}
    found = card(tmp_path, **given, preprocess={"pool": lambda images: images.float() / 255})
    assert list(found.errors) == sorted(CHANGING, key=list(PARTS).index)
    assert all("`preprocess` must map uint8 images" in found.errors[part]["pool"] for part in CHANGING)
    assert "pool" in found.outcomes["knn"]

    def rounded(images):
        return as_float(images) + (0 if images.is_floating_point() else 0.4 / 255)  # as a resize of uint8 rounds

    assert card(tmp_path / "rounded", **given, preprocess={"pool": rounded}).errors == {}


class Dropped(Pool):
    """Has a Dropout, which features do not show."""

    def __init__(self, rate):
        super().__init__()
        self.dropout = nn.Dropout(rate)


@pytest.mark.slow
def test_kept_parts_are_of_the_same_preprocessing_and_training(tmp_path):
    given = {"parts": ("knn", "attacks")}

    def darker(images):
        return as_float(images) * (0.97 if images.is_floating_point() else 1)

    frozen = Pool()
    frozen.layer.bias.requires_grad_(False)
    for place, (model, preprocess) in enumerate(
        [(Pool(), {}), (Pool(), {"m": darker}), (frozen, {}), (Dropped(0.1), {}), (Dropped(0.2), {}), (Pool(), {})]
    ):
        card(tmp_path, of={"m": model}, preprocess=preprocess, **given)
        assert len(list((tmp_path / "parts").glob("attacks-*"))) == min(place + 1, 5)


@pytest.mark.slow
def test_parts_without_labels_work_without_labels(tmp_path):
    found = card(tmp_path, parts=("knn", "geometry"), data=Data(labels=False), of={"pool": Pool()})
    assert "`datamodule` must yield labels for this part" in found.errors["knn"]["pool"]
    assert found.outcomes["geometry"]["pool"].values["effective rank"] > 1


class Fatal(Pool):
    """Kills its process at some image."""

    def __init__(self, log, die_at=None):
        super().__init__()
        self.log, self.die_at = log, die_at

    def __repr__(self):
        return "Fatal"

    def forward(self, images):
        with self.log.open("a") as file:
            file.write("x" * len(images))
        if self.die_at is not None and self.log.stat().st_size >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


@pytest.mark.dist
def test_a_killed_report_continues(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(ChildError):  # in the part "geometry", which encodes views
        run_processes(lambda _: card(tmp_path / "a", of={"pool": Fatal(log, die_at=4 + 120 + 4 + 66 + 4 + 1)}), 1)
    names = {path.name.split("-")[0] for path in (tmp_path / "a" / "parts").iterdir()}
    assert names == {"knn", "retrieval"}
    assert not (tmp_path / "a" / "report.json").exists()
    before = log.stat().st_size
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "parts").iterdir()}
    card(tmp_path / "a", of={"pool": Fatal(log)})
    assert log.stat().st_size - before < 120  # the training images are not encoded again
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    card(tmp_path / "b", of={"pool": Fatal(tmp_path / "other")})
    assert (tmp_path / "a" / "report.json").read_bytes() == (tmp_path / "b" / "report.json").read_bytes()


@pytest.mark.dist
def test_two_ranks_write_one_processes_report(tmp_path):
    torch.set_num_threads(1)
    card(tmp_path / "one")
    tables = run_processes(lambda _: card(tmp_path / "two").table(), 2)
    assert tables[0] == tables[1]
    assert (tmp_path / "one" / "report.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()


def vit():
    """A vision transformer of 16 patches, whose attention and maps the dense parts judge."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "dynamic_img_size": True}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size)
    network.input_spec = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    return network


@pytest.mark.dist
def test_two_ranks_give_the_dense_figures_of_one_process(tmp_path):
    torch.set_num_threads(1)
    given = {"parts": ("segmentation", "attention", "detection", "similarity"), "data": Data(count=60)}
    found = card(tmp_path / "one", of={"vit": vit()}, **given)
    run_processes(lambda _: card(tmp_path / "two", of={"vit": vit()}, **given), 2)
    assert (tmp_path / "one" / "report.json").read_bytes() == (tmp_path / "two" / "report.json").read_bytes()
    assert found.errors == {}
    assert all(found.outcomes[part]["vit"].values for part in ("segmentation", "attention", "detection"))
    layers = found.outcomes["similarity"]["vit"].curves
    assert list(layers) == ["patch_embed", "blocks.0", "blocks.1", "norm", "output"]
    images = torch.cat([images for images, _ in Data(count=60).val_dataloader()])
    spaced = images[[place * 66 // 8 for place in range(8)]]
    inputs = spec_transform(vit().input_spec)(spaced)
    direct = ev.layer_similarity(vit(), inputs).cka
    assert [value for _, value in layers["blocks.1"]] == near64(direct[2].tolist())
    assert "CKA of the layers of vit" in (tmp_path / "one" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"of": {"x": 3}}, ValueError, "`models` must include one that can be evaluated, got 'x'.*be a module"),
        ({"parts": ("knm",)}, ValueError, "`parts` must be one of .* Did you mean 'knn'"),
        ({"parts": "knn"}, TypeError, '`parts` must be a list of names or "all"'),
        ({"reference": "poll"}, ValueError, "`reference` must be one of 'pool', 'blind'"),
        ({"seed": -1}, ValueError, "`seed` must be >= 0"),
        ({"data": [1]}, TypeError, "`datamodule` must be a LightningDataModule"),
    ],
)
def test_bad_input_is_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        card(tmp_path, **arguments)


def test_unknown_options_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`options` must be one of .* Did you mean 'grid_steps'"):
        ev.report(models(), Data(), output=tmp_path, options={"grid_step": 1})
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Cannot write to `output`"):
        card(tmp_path / "file")


@pytest.mark.slow
def test_the_command_judges_exported_backbones(tmp_path, capsys):
    spec = {"size": 16, "mean": None, "std": None}
    torch.manual_seed(0)
    export(build_backbone("small_convnet").module, tmp_path / "net.pt", input_spec=spec)
    shutil.copy(tmp_path / "net.pt", tmp_path / "epoch=0-step=9.pt")  # as Lightning names checkpoints
    given = [
        str(tmp_path / "net.pt"),
        f"other={tmp_path / 'net.pt'}",
        str(tmp_path / "epoch=0-step=9.pt"),
        "--data=EmojiDataModule",
        "--data.batch_size=128",
    ]
    of_data = ["--transfer.again=EmojiDataModule", "--transfer.again.validation_fold=1"]
    options = '--options={"pictures": 9, "sweep_steps": 0, "max_iter": 2}'
    found = main(["report", *given, *of_data, f"--output={tmp_path / 'out'}", "--parts=[knn,transfer]", options])
    assert list(found.models) == ["net", "other", "epoch=0-step=9"]
    values = found.outcomes["transfer"]["net"].values
    assert set(values) == {"mean linear top1", "again, linear top1", "again, k-NN top1 (k = 20)"}
    assert values["again, k-NN top1 (k = 20)"] != found.outcomes["knn"]["net"].values["top1 (k = 20)"]  # of the fold
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n"
    with pytest.raises(ValueError, match="`models` must have different names"):
        main(["report", given[0], given[0], "--data=EmojiDataModule", f"--output={tmp_path / 'out'}"])


@pytest.mark.parametrize("size", [16, 12])
def test_a_model_with_an_input_spec_is_attacked_through_its_preprocessing(size, tmp_path):
    """Checkpoints and exported backbones have one."""
    model = Pool()
    model.input_spec = {"size": size, "mean": [0.4] * 3, "std": [0.2] * 3}
    found = card(tmp_path, parts=("attacks",), of={"pool": model})
    assert found.errors == {}
    values = found.outcomes["attacks"]["pool"].values
    assert values["robust accuracy (64/255)"] < values["clean accuracy"]


@pytest.mark.slow
def test_two_processes_may_save_one_report(whole, tmp_path, monkeypatch):
    """The second one saves while the first one writes its first file, as a report that was started twice."""
    found, _ = whole
    write, inside = Path.write_text, []

    def slow(path, text, **options):
        size = write(path, text, **options)
        if not inside:
            inside.append("second")
            found.save(tmp_path)
        return size

    monkeypatch.setattr(os, "getpid", lambda: len(inside))
    monkeypatch.setattr(Path, "write_text", slow)
    found.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "measured.json", "report.md", "report.html"}
