"""The generated sets of the domains: deterministic, balanced, the label where the domain has it and only there."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, label

from benchmarks import domains
from benchmarks._domain_sets import AGP, ER, MITO, RNA, SETS, DomainImages, draw_image, draw_split
from lightning_contrast import evaluation
from tests.tolerances import assert_same_bits

NAMES = list(SETS)
TRAIN, TEST = 240, 120


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_a_function_of_seed_split_and_index(name):
    image, answer = draw_image(name, 3, "train", 7)
    again, _ = draw_image(name, 3, "train", 7)
    assert np.array_equal(image, again)
    for other in ((4, "train", 7), (3, "val", 7), (3, "train", 7 + len(SETS[name].classes))):
        different, same_label = draw_image(name, *other)
        assert not np.array_equal(image, different)
        assert same_label == answer
    assert np.array_equal(draw_image(name, 3, "val", 7)[0], draw_image(name, 3, "test", 7)[0])
    assert np.array_equal(draw_split(name, 3, "train", 10)[0][7].numpy(), image)  # whatever the size of the split


@pytest.mark.parametrize("name", NAMES)
def test_classes_are_balanced_and_images_are_stored_as_in_the_domain(name):
    domain = SETS[name]
    data = DomainImages(name, 0, train=40, test=20)
    assert data.images("train").shape == (40, domain.channels, 48, 48)
    for split in ("train", "val"):
        counts = data.labels(split).bincount(minlength=data.num_classes)
        assert counts.tolist() == [len(data.labels(split)) // data.num_classes] * data.num_classes
    assert data.images("train").dtype == (torch.uint8 if domain.scale is None else torch.int16)
    assert data.images("train").min() >= 0
    assert data.images("train").max() <= domain.white
    unit = DomainImages(name, 0, train=40, test=20, unit=True)
    assert_same_bits(unit.images("train"), data.images("train").float() / domain.white)


@pytest.mark.parametrize("name", ["histology", "microscopy"])
def test_sites_of_the_test_are_not_those_of_training(name):
    """A constant of the site, here the channels' mean over all images of it, clusters by site; the label does not."""
    domain = SETS[name]
    classes = len(domain.classes)
    means = {}
    for split, count in zip(("train", "val"), domain.sites, strict=True):
        images = draw_split(name, 0, split, classes * count * 3)[0].double().mean((2, 3))
        means |= {(split, site): images.view(3, count, classes, -1)[:, site].mean((0, 1)) for site in range(count)}
    sites = torch.stack(list(means.values()))
    distances = torch.cdist(sites, sites).fill_diagonal_(torch.inf)
    assert len(sites) == sum(domain.sites)
    assert distances.min() > 1  # of 255 levels


# ------------------------------------------------- what a person would measure, per image (N, C, H, W) -> (N, F)


def tissue(pixels):
    """Count, size and shape of nuclei, found by a threshold of the image's own, and the brightest area."""
    rows = []
    for red in pixels[:, 0].numpy():
        parts, count = label(red < (np.quantile(red, 0.02) + np.quantile(red, 0.9)) / 2)
        areas = np.bincount(parts.ravel())[1:]
        places = [np.argwhere(parts == one + 1) for one in areas.argsort()[-8:]]
        spreads = [np.sqrt(np.linalg.eigvalsh(np.cov(place.T) + 0.1 * np.eye(2))) for place in places if len(place) > 2]
        longest = np.median([spread[1] / spread[0] for spread in spreads])
        bright = gaussian_filter(red, 2)
        rows.append([count, np.median(areas), areas.sum(), longest, bright.max() / np.median(bright)])
    return np.array(rows)


def infrared(pixels):
    """Medians of the ratios of infrared bands, which no illumination changes."""
    nir, first, second = (pixels[:, band].flatten(1) + 0.01 for band in (3, 4, 5))
    return torch.stack([(first / nir).median(1)[0], (second / nir).median(1)[0], (nir / second).log().mean(1)], 1)


def visible(pixels):
    """Mean, deviation and ratios of the visible bands."""
    bands = pixels[:, :3].flatten(2)
    ratios = (bands[:, 0] / (bands[:, 1] + 0.01)).median(1)[0], (bands[:, 2] / (bands[:, 1] + 0.01)).median(1)[0]
    return torch.cat([bands.mean(2), bands.std(2), torch.stack(ratios, 1)], 1)


def sides(pixels):
    """The image minus its mirror image, smoothed and standardized: what differs between the lungs."""
    smooth = gaussian_filter(pixels[:, 0].numpy(), (0, 2, 2))
    return ((smooth - smooth[:, :, ::-1]) / smooth.std((1, 2), keepdims=True))[:, 4:44:4, 4:24:4].reshape(
        len(pixels), -1
    )


def faults(pixels):
    """Darkest and brightest spots against the surroundings, at two scales."""
    gray = pixels.mean(1).numpy()
    found = []
    for sigma in (0.7, 1.5, 2.5):
        relative = gaussian_filter(gray, (0, sigma, sigma)) / (gaussian_filter(gray, (0, 3 * sigma, 3 * sigma)) + 0.02)
        inner = np.log(relative[:, 10:38, 10:38].reshape(len(gray), -1))
        found += [np.sort(inner, 1)[:, [0, 5, 15, -16, -6, -1]]]
    return np.concatenate(found, 1)


def granules(pixels):
    """Correlations of the granules of AGP with those of the other channels."""
    fine = pixels.numpy() - gaussian_filter(pixels.numpy(), (0, 0, 2, 2))
    rows = fine.reshape(*fine.shape[:2], -1)
    rows = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    return np.stack([(rows[:, AGP] * rows[:, other]).sum(1) for other in (ER, RNA, MITO)], 1)


def single_channels(pixels):
    """Mean and deviation of each channel, and how fine it is."""
    fine = pixels.numpy() - gaussian_filter(pixels.numpy(), (0, 0, 2, 2))
    return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3)), torch.from_numpy(fine).std((2, 3))], 1)


def accuracy(name, measure, answers=None, of_test=None):
    """Return the accuracy of logistic regression on measurements; ``answers`` maps labels, -1 leaves images out."""
    found = []
    for split, count, measure_split in (("train", TRAIN, measure), ("val", TEST, of_test or measure)):
        images, labels = draw_split(name, 0, split, count)
        labels = labels if answers is None else torch.tensor(answers)[labels]
        pixels = images.float()[labels >= 0] / SETS[name].white
        found += [torch.as_tensor(np.asarray(measure_split(pixels)), dtype=torch.float64), labels[labels >= 0]]
    return evaluation.linear_top1(*found, c=1.0)


MEASUREMENTS = {
    "histology": (tissue, None, 0.8),
    "satellite": (infrared, None, 0.8),
    "chest": (sides, dict(SETS["chest"].parts)["side"], 0.8),
    "industrial": (faults, None, 0.6),
    "microscopy": (granules, None, 0.8),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_the_label_is_in_the_image(name):
    measure, answers, least = MEASUREMENTS[name]
    assert accuracy(name, measure, answers) > least


@pytest.mark.parametrize(("name", "measure"), [("satellite", visible), ("microscopy", single_channels)])
@pytest.mark.slow
def test_the_label_is_not_where_it_should_not_be(name, measure):
    assert accuracy(name, measure) < 0.4  # chance is 0.25


def test_a_flip_exchanges_the_sides_of_a_chest():
    side = dict(SETS["chest"].parts)["side"]
    assert accuracy("chest", sides, side, of_test=lambda pixels: sides(pixels.flip(3))) < 0.3


# --------------------------------------------------------------------------------------------------- the benchmark


@pytest.mark.parametrize("row", domains.ROWS)
def test_a_run_judges_the_frozen_features(row, monkeypatch):
    monkeypatch.setitem(domains.BUDGET, "warmup_epochs", 0)
    found = domains.run("chest", row, 0, 1, {"train": 80, "test": 40, "batch_size": 40})
    assert all(0 <= found[figure] <= 1 for figure in ("knn", "side", "size"))


@pytest.mark.parametrize("name", NAMES)
def test_both_policies_give_views_of_one_size_and_normalization(name):
    images, _ = draw_split(name, 0, "train", 20)
    unit = DomainImages(name, 0, train=20, test=20, unit=True).images("train")
    theirs, ours = (domains.policy_of(name, row, images) for row in domains.ROWS[2:])
    wanted = theirs.input_spec | ({} if ours.scale is None else {"scale": list(ours.scale)})
    del wanted["interpolation"]  # bicubic as published; images of this size are not resized for the evaluation
    assert ours.input_spec == wanted
    whole = [domains.policy_of(name, row, images, 48) for row in domains.ROWS[2:]]
    assert_same_bits(whole[0].eval_transform(unit), whole[1].eval_transform(images))


def test_a_run_is_repeated_if_its_budget_its_set_or_its_policy_changed(monkeypatch):
    row = "domain's policy"
    one = domains.settings_of("chest", row, 0, 2)
    assert one == domains.settings_of("chest", row, 0, 2)
    others = [domains.settings_of("chest", *other) for other in (("ImageNet's policy", 0, 2), (row, 1, 2), (row, 0, 3))]
    with monkeypatch.context() as patch:
        patch.setitem(domains.POLICIES, "chest", partial(domains.POLICIES["chest"], gamma=(0.8, 1.5)))
        others.append(domains.settings_of("chest", row, 0, 2))
    with monkeypatch.context() as patch:
        patch.setitem(domains.BUDGET, "lr", 1e-2)
        others.append(domains.settings_of("chest", row, 0, 2))
    assert len({domains.fingerprint(settings) for settings in (one, *others)}) == 1 + len(others)


def test_summary_gives_means_ranges_and_paired_differences(tmp_path):
    for row, values in (("ImageNet's policy", (0.5, 0.6)), ("domain's policy", (0.7, 0.5))):
        for seed, value in enumerate(values):
            record = {"set": "industrial", "row": row, "seed": seed, "seconds": 9.0 + seed, "knn": value}
            (tmp_path / f"{row}-{seed}.json").write_text(json.dumps(record))
    (line,) = domains.summary(tmp_path)
    assert line["ImageNet's policy"] == "0.550 (0.500-0.600)"
    assert line["domain's policy"] == "0.600 (0.500-0.700)"
    assert line["difference, per seed"] == "+0.200, -0.100"
    assert [line[key] for key in ("set", "raw pixels", "seconds", "seeds")] == ["industrial", "", "9-10", "2"]
