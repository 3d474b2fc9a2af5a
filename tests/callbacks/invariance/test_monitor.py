"""`InvarianceMonitor` on encoders with known invariances; perturbations against torchvision."""

import logging
import math

import lightning as L
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_contrast.augment import simclr_cifar_views
from lightning_contrast.callbacks import InvarianceMonitor, StepSeed, ViewAugmentation
from lightning_contrast.callbacks.invariance.perturbations import CHANGES, changed, similarity
from lightning_contrast.callbacks.invariance.report import summarize
from lightning_contrast.testing import assert_callback_changes_nothing, assert_resume_exact, run_processes
from tests.callbacks.probe_modules import (
    Loaders,
    Sharding,
    adversary,
    classifier,
    equal_states,
    images_and_labels,
    labelled,
    quiet_fit,
    random_state,
    trainers,
)
from tests.callbacks.strategies import TakeWeights, fit_ranks, sharded
from tests.tolerances import FORMULA, NETWORK, f32, near

FEW = {"changes": ["grayscale", "flip"], "samples": 8}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pictures are drawn where the Trainer runs


def pictures(count=12, edge=16, seed=0):
    """Return smooth images in 0..1 that all differ, 8-bit values."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = F.interpolate(coarse, (edge, edge), mode="bicubic", align_corners=False).clamp(0, 1)
    return (images * 255).round() / 255


def test_similarity_is_that_of_plain_loops():
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(6, 5, generator=generator, dtype=torch.float64) + 3
    other = plain + 0.3 * torch.randn(6, 5, generator=generator, dtype=torch.float64)

    def cosine(a, b):
        return float((a @ b) / (a.norm() * b.norm()))

    center = sum(plain) / 6
    own = sum(cosine(a - center, b - center) for a, b in zip(plain, other, strict=True)) / 6
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    different = sum(cosine(plain[i] - center, plain[j] - center) for i, j in pairs) / len(pairs)
    assert float(similarity(plain, other)) == near((own - different) / (1 - different))
    assert float(similarity(plain, plain)) == near(1)
    assert float(similarity(plain, plain[[1, 2, 3, 4, 5, 0]])) == pytest.approx(
        (sum(cosine(plain[i] - center, plain[(i + 1) % 6] - center) for i in range(6)) / 6 - different)
        / (1 - different)
    )


def test_a_constant_part_of_the_features_does_not_make_them_similar():
    generator = torch.Generator().manual_seed(2)
    plain, other = torch.randn(2, 64, 16, generator=generator).unbind(0)
    shifted = plain + 10
    assert float(F.cosine_similarity(shifted, other + 10).mean()) > 0.9
    assert abs(float(similarity(shifted, other + 10))) < 0.1


def alternate(images, function, strength):
    """Apply a function of one image and a signed strength, + for even and - for odd images."""
    return torch.stack([function(image, strength * (1 - 2 * (i % 2))) for i, image in enumerate(images)])


ORACLES = {
    "brightness": lambda image, s: reference.adjust_brightness(image, 1 + s),
    "contrast": lambda image, s: reference.adjust_contrast(image, 1 + s),
    "saturation": lambda image, s: reference.adjust_saturation(image, 1 + s),
    "hue": lambda image, s: reference.adjust_hue(image, s),
    "grayscale": lambda image, s: torch.lerp(image, reference.rgb_to_grayscale(image, 3), abs(s)),
    "flip": lambda image, s: reference.horizontal_flip(image),
}


@pytest.mark.parametrize("name", ORACLES)
def test_changes_are_those_of_torchvision(name):
    images = pictures()
    for strength in CHANGES[name].strengths:
        expected = alternate(images, ORACLES[name], strength)
        torch.testing.assert_close(changed(images, CHANGES[name], strength), expected, atol=3e-3, rtol=0)


def test_blur_crop_shift_and_rotation():
    images = pictures(edge=20)
    blurred = reference.gaussian_blur(images, [13, 13], [2.0, 2.0])
    torch.testing.assert_close(changed(images, CHANGES["blur"], 0.1), blurred, **f32(NETWORK))
    middle = F.interpolate(images[..., 5:15, 5:15], (20, 20), mode="bilinear")
    torch.testing.assert_close(changed(images, CHANGES["crop"], 0.75), middle)
    shifted = changed(images, CHANGES["shift"], 0.1)
    torch.testing.assert_close(shifted[0, :, :, 2:], images[0, :, :, :-2], **f32(FORMULA))
    torch.testing.assert_close(shifted[1, :, :, :-2], images[1, :, :, 2:], **f32(FORMULA))
    turned = changed(images, CHANGES["rotation"], 90.0)
    torch.testing.assert_close(turned[0], images[0].rot90(1, (1, 2)), **f32(NETWORK))
    torch.testing.assert_close(turned[1], images[1].rot90(-1, (1, 2)), **f32(NETWORK))


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "flip"])
def test_no_strength_is_no_change_and_the_images_are_left_alone(name):
    images = pictures()
    kept = images.clone()
    strength = 1e-6 if name == "blur" else 0.0
    torch.testing.assert_close(changed(images, CHANGES[name], strength), images, **f32(NETWORK))
    changed(images, CHANGES[name], CHANGES[name].strengths[-1])
    assert torch.equal(images, kept)


class Sees(L.LightningModule):
    """Module with a fixed backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.weight = backbone, nn.Linear(1, 1)

    def forward(self, images):
        return self.backbone(images)

    def training_step(self, batch, batch_idx):
        return self.weight(batch[0].mean().view(1, 1)).mean()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Luminance(nn.Module):
    def forward(self, images):
        return (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1).flatten(1)


class MeanColor(nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3))


def loader(images, **kwargs):
    return DataLoader(TensorDataset(images, torch.zeros(len(images), dtype=torch.int64)), batch_size=4, **kwargs)


def watch(backbone, images, monitor, **settings):
    return quiet_fit(Sees(backbone), [monitor], labelled(16), loader(images), max_epochs=1, **settings)


@pytest.mark.slow
def test_a_grey_encoder_is_blind_to_colour_and_not_to_place():
    monitor, images = InvarianceMonitor(samples=12), pictures()
    run = watch(Luminance(), images, monitor)
    values = {name.removeprefix("invariance/"): float(value) for name, value in run.callback_metrics.items()}
    assert values["grayscale"] == pytest.approx(1, abs=1e-3)
    assert values["grayscale/1"] == pytest.approx(1, abs=1e-3)
    assert values["saturation"] > 0.9  # but for what is cut to 0..1
    assert values["flip"] < 0.6
    assert values["rotation/180"] < 0.6
    flipped = Luminance()(images.flip(-1))
    assert values["flip"] == near(float(similarity(Luminance()(images), flipped)), size=1)
    assert values["hue"] == pytest.approx(sum(v for _, v in monitor.curves["hue"]) / 4)
    assert [strength for strength, _ in monitor.curves["hue"]] == [0.05, 0.1, 0.25, 0.5]
    assert "invariant to grayscale (1.00)" in monitor.summary


@pytest.mark.slow
def test_an_encoder_of_the_mean_colour_is_blind_to_place():
    run = watch(MeanColor(), pictures(), InvarianceMonitor(samples=12))
    values = run.callback_metrics
    assert values["invariance/flip"] == near(1, size=1)
    assert values["invariance/rotation/90"] == near(1, NETWORK, size=1)
    assert values["invariance/grayscale"] < 0.9
    assert values["invariance/hue/0.5"] < 0.5


def test_images_go_through_the_plain_policy_and_stay_8_bit():
    seen = []

    class Looks(Luminance):
        def forward(self, images):
            seen.append(images.clone())
            return super().forward(images)

    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    policy = simclr_cifar_views(8, mean=mean, std=std)
    images = (pictures() * 255).to(torch.uint8)
    monitor = InvarianceMonitor(changes=["flip"], samples=12)
    module = Sees(Looks())
    module.training_step = lambda batch, batch_idx: module.weight(torch.ones(1, 1)).mean()
    quiet_fit(module, [ViewAugmentation(policy), monitor], labelled(16), loader(images), max_epochs=1)
    assert torch.equal(torch.cat(seen[:3]), policy.eval_transform(images))
    assert torch.equal(torch.cat(seen[3:]), policy.eval_transform(images.flip(-1)))


@pytest.mark.slow
def test_normalised_images_are_changed_in_0_to_1():
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    images = pictures()
    normalised = (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)

    class Undo(Luminance):
        def forward(self, given):
            return super().forward(given * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1))

    three = {"changes": ["brightness", "hue", "flip"], "samples": 12}
    plain, monitor = InvarianceMonitor(**three), InvarianceMonitor(**three, mean=[0.4, 0.5, 0.6], std=std.tolist())
    watch(Luminance(), images, plain)
    watch(Undo(), normalised, monitor)
    for name, curve in plain.curves.items():
        assert monitor.curves[name] == [(s, near(v, NETWORK, size=1)) for s, v in curve]
    given = InvarianceMonitor(images=normalised, **three, mean=[0.4, 0.5, 0.6], std=std.tolist())
    watch(Undo(), pictures(8, seed=5), given)
    assert given.curves == monitor.curves


@pytest.mark.parametrize(
    "images",
    [
        (pictures() - 0.4) / 0.2,
        pictures() * 255,
        (pictures() * 255).round().int(),
        torch.full((12, 3, 8, 8), math.nan),
    ],
    ids=["normalized", "0..255", "whole numbers", "not a number"],
)
def test_images_outside_0_to_1_do_not_end_a_run_and_are_not_measured(images):
    """Those of a loader are read after an epoch: the callback is silent after one warning. Given ones are an error."""
    monitor = InvarianceMonitor(changes=["flip"], samples=12, every_n_epochs=1)
    with pytest.warns(UserWarning, match=r"logs nothing.*`images` must be in 0..1.*`mean` and `std`") as said:
        run = quiet_fit(classifier()(), [monitor], labelled(16), loader(images.float()), max_epochs=3)
    assert len([each for each in said if "logs nothing" in str(each.message)]) == 1
    assert run.current_epoch == 3
    assert not monitor.curves
    assert not any("invariance" in key for key in run.callback_metrics)
    with pytest.raises(ValueError, match=r"`images` must be in 0..1, got .*`mean` and `std`"):
        InvarianceMonitor(images=images)


@pytest.mark.slow
def test_images_are_spread_over_the_set_and_may_be_given():
    images = pictures(20)
    of_loader, given = InvarianceMonitor(**FEW), InvarianceMonitor(images=images, **FEW)
    chosen = InvarianceMonitor(images=images[[0, 2, 5, 7, 10, 12, 15, 17]], **FEW)
    for monitor in (of_loader, given, chosen):
        watch(Luminance(), images, monitor)
    assert of_loader.curves == given.curves == chosen.curves
    by_loader = InvarianceMonitor(dataloader=loader(images, shuffle=True), **FEW)
    watch(Luminance(), pictures(8, seed=5), by_loader)
    assert by_loader.curves == of_loader.curves


@pytest.mark.slow
def test_images_of_one_channel_have_no_colour():
    class First(nn.Module):
        def forward(self, images):
            return images.flatten(1)

    monitor = InvarianceMonitor(samples=12)
    watch(First(), pictures()[:, :1], monitor)
    assert monitor.curves.keys() == CHANGES.keys() - {"saturation", "hue", "grayscale"}


def test_own_changes():
    def noise(images, strength):
        return images + strength * torch.linspace(-1, 1, images.shape[-1])

    monitor = InvarianceMonitor(changes={"ramp": (noise, [0.1, 0.5])}, samples=12)
    run = watch(Luminance(), pictures(), monitor)
    assert 1 > run.callback_metrics["invariance/ramp/0.1"] > run.callback_metrics["invariance/ramp/0.5"]
    smaller = InvarianceMonitor(changes={"half": (lambda images, s: images[..., ::2], [1.0])}, samples=12)
    with pytest.raises(ValueError, match="`changes` must keep the shape"):
        watch(Luminance(), pictures(), smaller)


class Epochs(InvarianceMonitor):
    def __init__(self, **kwargs):
        super().__init__(**FEW, **kwargs)
        self.epochs = []

    def _measure(self, trainer, pl_module):
        super()._measure(trainer, pl_module)
        self.epochs.append(trainer.current_epoch)


@pytest.mark.slow
def test_it_measures_at_first_every_few_epochs_and_at_last():
    monitor = Epochs(every_n_epochs=3)
    run = quiet_fit(classifier()(), [monitor], labelled(16), max_epochs=6, val_check_interval=1)
    assert monitor.epochs == [0, 3, 5]
    run.fit_loop.max_epochs = 7
    quiet_fit(classifier()(), [], labelled(16), trainer=run)  # a second fit
    assert monitor.epochs == [0, 3, 5, 6]
    without = Epochs(images=pictures(edge=8))
    quiet_fit(classifier()(), [without], labelled(16), max_epochs=2, limit_val_batches=0)
    assert without.epochs == [0, 1]
    with pytest.warns(UserWarning, match="has no validation data. Give `images=`"):
        quiet_fit(classifier()(), [Epochs()], labelled(16), max_epochs=1, limit_val_batches=0)


@pytest.mark.slow
def test_the_run_is_the_same():
    assert_callback_changes_nothing(lambda: InvarianceMonitor(every_n_epochs=1, samples=8), max_epochs=1)


class Draws(TensorDataset):
    """Dataset with random augmentation."""

    def __getitem__(self, index):
        image, *rest = super().__getitem__(index)
        return (image * torch.rand(()), *rest)


@pytest.mark.parametrize("given", [False, True], ids=["validation", "dataloader"])
def test_a_set_that_draws_random_numbers_is_read_beside_those_of_the_run(given):
    def after(monitors):
        torch.manual_seed(2)
        quiet_fit(classifier()(), monitors(), labelled(16), DataLoader(Draws(*labelled(24).dataset.tensors)))
        return random_state()

    def monitors():
        images = DataLoader(Draws(*labelled(24).dataset.tensors), batch_size=4)
        return [InvarianceMonitor(dataloader=images if given else None, every_n_epochs=1, **FEW)]

    alone, watched = after(list), after(monitors)
    assert torch.equal(alone[0], watched[0])
    assert alone[1:] == watched[1:]


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"limit_val_batches": 0}], ids=str)
def test_the_run_is_the_same_under_other_settings(settings):
    # without validation it measures between two epochs of training, where BatchNorm and dropout are awake
    monitor = lambda: InvarianceMonitor(images=pictures(8, edge=8), every_n_epochs=1, **FEW)  # noqa: E731
    assert_callback_changes_nothing(monitor, accumulate_grad_batches=2, **settings)


@pytest.mark.dist
def test_the_run_is_the_same_on_two_ranks():
    assert_callback_changes_nothing(lambda: InvarianceMonitor(**FEW), world_size=2, max_epochs=1)


@pytest.mark.parametrize("library", ["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("kind", [classifier, adversary])
@pytest.mark.slow
def test_weights_and_random_numbers_are_those_of_a_run_without_it(library, kind):
    trainer, base = trainers()[library]
    make = kind(base)
    alone, watched = make(), make()
    quiet_fit(alone, [], trainer=trainer)
    after_alone = random_state()
    monitors = [InvarianceMonitor(every_n_epochs=1, **FEW), InvarianceMonitor("backbone.0", name="early", **FEW)]
    run = quiet_fit(watched, monitors, trainer=trainer)
    after_watched = random_state()
    assert equal_states(alone.state_dict(), watched.state_dict())
    assert torch.equal(after_alone[0], after_watched[0])
    assert after_alone[1:] == after_watched[1:]
    assert -1 < run.callback_metrics["invariance/grayscale"] <= 1
    assert run.callback_metrics["early/flip"] != run.callback_metrics["invariance/flip"]
    assert all(not module._forward_hooks for module in watched.modules())


def weights_of_rank(rank, name, watched):
    take = TakeWeights()
    callbacks = [take, *([InvarianceMonitor(**FEW)] if watched else [])]
    run = fit_ranks(sharded(Sharding)(), callbacks, Loaders(), name)
    return take.history[-1], {key: float(value) for key, value in run.callback_metrics.items()}


@pytest.mark.dist
@pytest.mark.parametrize("name", ["fsdp1 wrapped", "fsdp2"])
def test_weights_are_the_same_where_they_are_sharded(name):
    alone = run_processes(weights_of_rank, 2, name, False, init=False)
    watched = run_processes(weights_of_rank, 2, name, True, init=False)
    for of_rank in range(2):
        assert equal_states(alone[of_rank][0], watched[of_rank][0])
    assert watched[0][1] == watched[1][1]
    assert {"invariance/grayscale", "invariance/flip/1"} <= watched[0][1].keys()


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_stopped():
    data = lambda: (labelled(16), labelled(16, seed=5))  # noqa: E731
    assert_resume_exact(classifier(), data, lambda: [StepSeed(0), InvarianceMonitor(**FEW)], max_epochs=3)


def test_nan_features_are_named_and_left_out():
    class Breaks(Luminance):
        def forward(self, images):
            features = super().forward(images)
            features[0, 0] = torch.nan
            return features

    monitor = InvarianceMonitor(images=pictures(), changes=["flip"])
    with pytest.warns(UserWarning, match="features 'backbone' of 1 of 12 images are NaN or infinite"):
        watch(Breaks(), pictures(), monitor)
    kept = pictures()[1:]
    expected = float(similarity(Luminance()(kept), Luminance()(kept.flip(-1))))
    assert monitor.curves["flip"] == [(1.0, near(expected, size=1))]


@pytest.mark.slow
def test_the_curves_are_drawn_and_told(tmp_path, caplog):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    monitor = InvarianceMonitor(samples=12, png_dir=tmp_path)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        watch(Luminance(), pictures(), monitor)
    assert "InvarianceMonitor `invariance`: features are invariant to" in caplog.text
    (path,) = tmp_path.iterdir()
    with image.open(path) as picture:
        assert min(picture.size) > 300
        assert len(picture.getcolors(maxcolors=2**20)) > 20


def test_summary():
    last = {"hue": [(0.1, 1.0), (0.5, 0.96)], "crop": [(0.5, 0.8), (0.8, 0.3)], "blur": [(1.0, 0.7)]}
    assert summarize(last) == "features are invariant to hue (0.96); sensitive to crop (0.30)."
    first = last | {"hue": [(0.1, 0.5), (0.5, 0.1)]}
    assert summarize(last, first).endswith("; largest change since the first measurement: hue +0.68.")
    assert summarize({"blur": [(1.0, 0.2)]}) == "features are sensitive to blur (0.20)."
    assert "neither invariant nor sensitive" in summarize({"blur": [(1.0, 0.7)]})


class Stream(IterableDataset):
    def __iter__(self):
        yield from TensorDataset(pictures(), torch.zeros(12))


def test_what_cannot_be_read_is_named():
    with pytest.raises(TypeError, match="`images` must be None, a str, an int or a callable"):
        InvarianceMonitor(images=loader(pictures()))
    with pytest.raises(TypeError, match="`dataloader` must be a DataModule or a loader"):
        InvarianceMonitor(dataloader=3)
    with pytest.raises(ValueError, match=r"`features` must name a submodule.*'backbone.3'"):
        quiet_fit(classifier()(), [InvarianceMonitor("backbone.33")])
    with pytest.raises(ValueError, match=r"`changes` must be one of.*Did you mean 'rotation'"):
        InvarianceMonitor(changes=["rotations"])
    with pytest.raises(TypeError, match="`changes\\['mine'\\]` must be \\(function, strengths\\)"):
        InvarianceMonitor(changes={"mine": [0.1]})
    with pytest.warns(UserWarning, match="logs nothing.*`dataloader` must be a DataLoader over a dataset of known len"):
        quiet_fit(classifier()(), [InvarianceMonitor()], val=DataLoader(Stream(), batch_size=4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"samples": 4}, "`samples` must be >= 8"),
        ({"every_n_epochs": 0}, "`every_n_epochs` must be >= 1"),
        ({"mean": [0.5]}, "`mean` must be given with `std`"),
        ({"mean": [0.5], "std": [0.0]}, "`std` must be > 0"),
        ({"changes": []}, "`changes` must be a sequence of names"),
        ({"changes": "hue"}, "`changes` must be a sequence of names"),
        ({"images": torch.zeros(3, 8, 8)}, r"`images` must be \(N, C, H, W\)"),
        ({"images": torch.zeros(3, 3, 8, 8), "dataloader": [1]}, "`images` must be given without `dataloader`"),
        ({"name": ""}, "`name` must be a word"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(ValueError, match=words):
        InvarianceMonitor(**arguments)


def test_the_images_do_not_depend_on_the_labels_of_a_class_sorted_set():
    images, labels = images_and_labels(40)
    order = labels.argsort()
    monitor = InvarianceMonitor(**FEW)
    data = DataLoader(TensorDataset(images[order].float() / 255, labels[order]), batch_size=40)
    run = quiet_fit(classifier()(), [monitor], val=data, max_epochs=1)
    batches = monitor._read(run)
    assert set(batches[0][1].tolist()) == {0, 1, 2}
