"""Every recipe that names a source has the source's numbers; all others say that they are our own."""

import ast
import inspect
import re
import sys

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.cli import main
from tests.recipes_imagenet import IMAGENET_SOURCES
from tests.recipes_table import CIFAR10_SOURCES, IMAGE_TEXT_SOURCES, View
from tests.test_cli import CPU, QUIET, RECIPES, SMALL, SMALL_BACKBONES

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

SOURCES = CIFAR10_SOURCES | IMAGENET_SOURCES | IMAGE_TEXT_SOURCES
PATHS = {path.stem: path for path in RECIPES}
RATE_TOLERANCE = 2e-3  # of the peak: solo-learn's warm-ups start at 3e-5, ours at 0; cosines end at 0.1 % or 0
NARROW = {key: value for key, value in SMALL.items() if key != "whitening_size"} | {"num_samples": 64}


class Planned(Exception):
    """Ends a run before its first batch."""


class StopAtStart(L.Callback):
    def on_train_start(self, trainer, pl_module):
        raise Planned


class Rows(torch.utils.data.Dataset):
    """As many rows as the data set has images; none is read."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        raise AssertionError("no image is needed")


def narrow(path, tmp_path):
    """Write the recipe with a small network; return the file and the arguments of the method as they are published."""
    recipe = yaml.safe_load(path.read_text())
    parameters = inspect.signature(getattr(lc, recipe["model"]["class_path"])).parameters
    given = recipe["model"]["init_args"]
    published = {key: parameter.default for key, parameter in parameters.items()} | given
    backbone = "vit_tiny_patch16_224" if given["backbone"].startswith("vit_") else "resnet10t"
    small = {key: value for key, value in NARROW.items() if key in parameters}
    small |= {"backbone": given["backbone"] if given["backbone"] in SMALL_BACKBONES else backbone}
    recipe["model"]["init_args"] = given | small
    written = tmp_path / path.name
    written.write_text(yaml.safe_dump(recipe))
    return written, published


def comment(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("# ") for line in lines)


def described(policy):
    """Return what a policy does to its views, in the terms of the table."""
    return [describe(view) for view in policy.views]


def describe(view):
    found = {type(operation).__name__: operation for operation in view.operations}
    crop, color = found.pop("FusedResizedCrop"), found.pop("FusedColorJitter")
    blur, solarize = found.pop("FusedGaussianBlur", None), found.pop("FusedSolarize", None)
    assert not found
    jitter = (color.brightness, color.contrast, color.saturation, color.hue)
    applied = any(jitter)
    return View(
        size=crop.size,
        crop=crop.scale,
        jitter=tuple(float(f"{strength:.6g}") for strength in jitter),
        jitter_p=color.probability if applied else 0.0,
        gray=color.grayscale,
        blur=0.0 if blur is None else blur.probability,
        solarize=0.0 if solarize is None else solarize.probability,
        flip=crop.flip,
        bicubic=crop.interpolation == "bicubic",
        gray_first=color.gray_first and applied,
        additive_brightness=color.additive_brightness,
    )


def attribute(module, name):
    for part in name.split("."):
        module = module[part] if isinstance(module, dict) else getattr(module, part)
    return module


def planned(cli, source):
    """Fit up to the first batch and return the optimizer and its scheduler."""
    cli.trainer.callbacks = [StopAtStart()]
    loader = DataLoader(Rows(source.images), cli.datamodule.batch_size, drop_last=True)
    with pytest.raises(Planned):
        cli.trainer.fit(cli.model, loader)
    (config,) = cli.trainer.lr_scheduler_configs
    assert config.interval == "step"
    return config.scheduler.optimizer, config.scheduler, len(loader)


def rates_at(scheduler, step):
    """Return the learning rates of the groups at an optimizer step."""
    scheduler.last_epoch = step - 1
    with torch.no_grad():
        scheduler.step()
    return [group["lr"] for group in scheduler.optimizer.param_groups]


def vectors_of(model, source):
    """Return norms, biases and whatever else the source treats like them."""
    alike = set()
    for name in source.undecayed:
        found = attribute(model, name)
        alike |= {found} if isinstance(found, torch.nn.Parameter) else set(found.parameters())
    return {parameter for parameter in model.parameters() if parameter.ndim <= 1} | alike


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("_imagenet") else []) for name in SOURCES]
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*scheduler.step", "ignore:.*val_dataloader")
@pytest.mark.slow
def test_recipe_equals_its_source(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    source = SOURCES[name]
    written, given = narrow(PATHS[name], tmp_path)
    cli = main(["--config", str(written), *CPU, *QUIET, f"--trainer.default_root_dir={tmp_path}"], run=False)
    model, trainer = cli.model, cli.trainer

    assert (trainer.max_epochs, cli.datamodule.batch_size) == (source.epochs, source.batch)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (1, None)
    assert {key: given[key] for key in source.arguments} == source.arguments
    assert {key: attribute(model, key) for key in source.settings} == source.settings

    policy = next(callback.policy for callback in trainer.callbacks if isinstance(callback, lc.ViewAugmentation))
    assert described(policy) == source.views
    if source.statistics is not None:
        assert (tuple(policy.mean), tuple(policy.std)) == source.statistics

    momenta = [c for c in model.default_callbacks() if isinstance(c, lc.MomentumUpdate)]
    assert len(momenta) == (source.momentum is not None)
    for callback in momenta:
        start, end, schedule = source.momentum
        assert (callback.start, callback.schedule) == (start, schedule)
        assert schedule == "constant" or callback.end == pytest.approx(end)

    optimizer, scheduler, length = planned(cli, source)
    check_groups(model, optimizer, source)
    check_rates(model, optimizer, scheduler, source, length)
    check_weight_decay(model, optimizer, source, length)


def check_groups(model, optimizer, source):
    assert type(optimizer).__name__ == source.optimizer
    assert {key: optimizer.param_groups[0][key] for key in source.options} == source.options
    vectors = vectors_of(model, source)
    for group in optimizer.param_groups:
        is_vectors = bool(group["params"]) and set(group["params"]) <= vectors
        assert not group["params"] or is_vectors or not set(group["params"]) & vectors
        assert not (is_vectors and group["weight_decay"] > 0)
        if source.optimizer == "LARS":
            assert group["adapt"] == (not is_vectors or source.adapted == "all")
    if source.decayed == "all":  # the package leaves norms and biases out, and each page says so
        page = ast.get_docstring(ast.parse(inspect.getsource(sys.modules[type(model).__module__])))
        assert "no weight decay on norms and biases" in " ".join(page.split()) or type(model) is lc.methods.MoCHi


def check_rates(model, optimizer, scheduler, source, length):
    epochs = source.epochs
    points = [0, 5, 10, *(round(share * epochs) for share in (0.25, 0.5, 0.6, 0.7, 0.8, 0.9)), epochs - 1]
    assert len(set(points)) >= 9
    peak = max(source.rate(epoch, epochs) for epoch in range(epochs))
    vectors = vectors_of(model, source)
    held = set() if source.constant is None else set(getattr(model, source.constant).parameters())
    for epoch in points:
        expected = source.rate(epoch, epochs)
        for group, rate in zip(optimizer.param_groups, rates_at(scheduler, epoch * length), strict=True):
            if not group["params"] or group.get("lr_multiplier", 1.0) not in (1.0, source.vectors):
                continue
            share = source.vectors if set(group["params"]) <= vectors else 1.0
            wanted = peak if held and set(group["params"]) <= held else expected
            assert rate == pytest.approx(share * wanted, abs=RATE_TOLERANCE * share * peak), epoch


def check_weight_decay(model, optimizer, source, length):
    start, end = source.weight_decay
    if hasattr(model, "weight_decay_at"):
        total = source.epochs * length
        assert model.weight_decay_at(0, total) == pytest.approx(start, rel=1e-3)
        assert model.weight_decay_at(total, total) == pytest.approx(end, rel=1e-3)
        if start == end:
            assert model.weight_decay_at(total / 2, total) == pytest.approx(start)
    else:
        assert start == end == optimizer.param_groups[0]["weight_decay"]


@pytest.mark.slow
@pytest.mark.parametrize("short", ["fast_dev_run=true", "max_epochs=1"])
@pytest.mark.parametrize("name", [name for name in SOURCES if name.endswith("_cifar10")])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*val_dataloader")
def test_a_recipe_is_planned_for_a_run_that_is_shorter_than_its_warmup(name, short, tmp_path, monkeypatch):
    """`fast_dev_run` always works; a warm-up that a recipe gives and that does not fit into a run is named."""
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    written, given = narrow(PATHS[name], tmp_path)
    options = [*CPU, *QUIET, f"--trainer.default_root_dir={tmp_path}", f"--trainer.{short}"]
    cli = main(["--config", str(written), *options], run=False)
    if short.startswith("fast_dev_run") or given.get("warmup_epochs") in (None, 0):
        assert planned(cli, SOURCES[name])
    else:
        with pytest.raises(ValueError, match=r"`warmup_epochs` must fit into the \d+ steps of the run, got '\d+ epo"):
            cli.trainer.fit(cli.model, DataLoader(Rows(SOURCES[name].images), cli.datamodule.batch_size))


@pytest.mark.parametrize("name", PATHS)
def test_first_comment_names_the_source(name):
    text = comment(PATHS[name])
    if name in SOURCES:
        assert any(word in text for word in ("reference implementation", "paper", "solo-learn"))
        assert "our own" not in text.lower()
    else:
        assert text.startswith("Our own settings")


PUBLISHED = {
    **{"barlow_twins": "92.10", "byol": "92.58", "dino": "89.52", "moco_v3": "93.10", "nnclr": "91.88"},
    **{"swav": "89.17", "vicreg": "92.07", "simclr": "90.74", "simsiam": "90.51", "supcon": "93.82", "wmse": "88.67"},
    **{"moco": "92.94"},
}
"""Accuracy on CIFAR-10 by solo-learn's table, in percent: linear, ResNet-18, 1,000 epochs."""


def test_recipes_synchronize_batchnorm_where_their_source_does():
    """Official programs that convert BatchNorm, and papers that synchronize it over all or eight devices."""
    synchronized = {name for name, path in PATHS.items() if "sync_batchnorm: true" in path.read_text()}
    methods = {"barlow_twins", "byol", "moco_v3", "simclr", "simsiam", "swav", "vicreg", "vicregl", "visreg"}
    assert synchronized == {f"{name}_imagenet" for name in methods} | {"temporal_contrast_ucf101"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_cifar10_recipe_has_the_published_accuracy_with_its_source(name):
    line = re.search(r"^# Published accuracy: (.*)$", PATHS[f"{name}_cifar10"].read_text(), flags=re.M)[1]
    assert re.search(rf"{PUBLISHED[name]} % (?:linear, online \(solo-learn|(?:linear )?with solo-learn's)", line), line


def test_every_cifar10_recipe_with_a_source_has_a_published_accuracy_or_none_exists():
    without = {name for name in CIFAR10_SOURCES if "# Published accuracy:" not in PATHS[name].read_text()}
    assert without == {"align_uniform_cifar10"}  # the source's run is on STL-10


def test_table_has_no_recipe_that_does_not_exist():
    assert SOURCES.keys() <= PATHS.keys()
