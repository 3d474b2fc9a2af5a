"""Measures of predictions: values of the reference implementations, scikit-learn and torchmetrics, and bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_contrast import evaluation as ev
from lightning_contrast import metrics
from tests.tolerances import CONVERGED, NETWORK, TRAINING, f32, f64, near, near64

RECORDS = {r["name"]: r for r in json.loads(Path(__file__).with_name("official_measures.json").read_text())}


def record(name, dtype=torch.float64):
    found = RECORDS[name]
    given = {
        key: torch.tensor(value, dtype=torch.int64 if "label" in key and key != "neighbour_labels" else dtype)
        for key, value in found["inputs"].items()
        if isinstance(value, list) and key not in ("ground_truth", "text_image", "correct")
    }
    return found, given


def test_expected_calibration_error():
    found, given = record("ece")
    assert ev.calibration_error(**given, bins=15).item() == near(found["value"])
    theirs = multiclass_calibration_error(given["logits"].softmax(1), given["labels"], 6, 10, "l1")
    assert ev.calibration_error(**given, bins=10).item() == near(theirs.item())


def test_confidences_at_an_edge_belong_to_the_bin_below():
    logits = torch.tensor([[0.0, 0.0], [60.0, 0.0], [3.0, 0.0]], dtype=torch.float64)  # 0.5, 1 and 0.95
    labels = torch.tensor([0, 1, 0])  # right, wrong, right; 1 and 0.95 share a bin
    confidence = 1 / (1 + math.exp(-3))
    assert ev.calibration_error(logits, labels, bins=2).item() == near64((0.5 + abs(1 - 1 - confidence)) / 3)


def test_calibration_error_by_equal_masses():
    found, given = record("rms_calibration")
    correct = torch.tensor(found["inputs"]["correct"])
    rms = ev.rms_calibration_error(given["confidences"], correct, bin_size=100, omit_last_bin=True)
    assert rms.item() == near64(found["value"]["rms"])
    assert ev.aurra(given["confidences"], correct).item() == near64(found["value"]["aurra"])
    order = np.argsort(found["inputs"]["confidences"])
    gaps = np.asarray(found["inputs"]["confidences"])[order] - np.asarray(found["inputs"]["correct"])[order]
    bins = [gaps[100 * i : 100 * (i + 1)] for i in range(8)] + [gaps[800:]]
    expected = math.sqrt(sum(len(part) / len(gaps) * part.mean() ** 2 for part in bins))
    assert ev.rms_calibration_error(given["confidences"], correct).item() == near64(expected)
    assert ev.rms_calibration_error(given["confidences"][:7], correct[:7]).isfinite()


def test_ood_metrics():
    found, given = record("ood_metrics")
    ours = ev.ood_metrics(**given, tpr=0.95)
    assert ours == near64(found["value"])
    assert "fpr90_id_positive" in ev.ood_metrics(**given, tpr=0.9)
    flipped = ev.ood_metrics(-given["out_scores"], -given["in_scores"])
    assert flipped["auroc"] == near64(ours["auroc"])
    assert flipped["fpr_ood_positive"] == near64(ours["fpr95_id_positive"])
    labels = [1] * len(given["in_scores"]) + [0] * len(given["out_scores"])
    assert ours["auroc"] == near64(roc_auc_score(labels, torch.cat([*given.values()])))


def test_conformal_sets():
    found, given = record("conformal_sets")
    calibration = given["calibration_probabilities"], given["calibration_labels"]
    threshold = ev.conformal_threshold(*calibration, alpha=0.1)
    assert threshold == near64(found["value"]["aps"]["threshold"])
    sets = ev.conformal_sets(given["probabilities"], threshold)
    assert sets == found["value"]["aps"]["sets"]
    raps = ev.conformal_threshold(*calibration, alpha=0.1, kreg=2, penalty=0.1)
    assert raps == near64(found["value"]["raps"]["threshold"])
    assert ev.conformal_sets(given["probabilities"], raps, kreg=2, penalty=0.1) == found["value"]["raps"]["sets"]


@pytest.mark.parametrize("options", [{}, {"kreg": 2, "penalty": 0.1}], ids=["APS", "RAPS"])
def test_the_guarantee_covers_and_the_plain_quantile_with_penalties_does_not(options):
    generator = torch.Generator().manual_seed(0)
    covered = {True: [], False: []}
    for _ in range(200):
        probabilities = torch.rand(60, 12, generator=generator, dtype=torch.float64).pow(3)
        probabilities = probabilities / probabilities.sum(1, keepdim=True)
        labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        for guarantee, hits in covered.items():
            given = probabilities[:40], labels[:40]
            threshold = ev.conformal_threshold(*given, alpha=0.2, guarantee=guarantee, **options)
            sets = ev.conformal_sets(probabilities[40:], threshold, extra=0, **options)
            hits += [int(label) in found for label, found in zip(labels[40:], sets, strict=True)]
    assert 0.79 <= np.mean(covered[True]) < 0.85
    if options:
        assert np.mean(covered[False]) < 0.75


def test_too_few_images_for_the_guarantee_give_all_classes():
    probabilities = torch.tensor([[0.6, 0.4]] * 5)
    assert ev.conformal_threshold(probabilities, torch.zeros(5, dtype=torch.int64), guarantee=True) == math.inf
    assert ev.conformal_sets(probabilities, math.inf)[0] == [0, 1]


def test_mean_corruption_error():
    found = RECORDS["mce"]
    ours = ev.mean_corruption_error(**found["inputs"], **found["params"])
    assert ours["mce"] == near64(found["value"])
    assert ours["corruption_error"] == near64(found["corruption_error"])
    assert ours["relative_mce"] == near64(found["relative_mce"])
    plain = ev.mean_corruption_error({"fog": [0.5, 0.7]}, baseline_errors={"fog": 0.8})
    assert plain == {"mce": near64(50.0), "corruption_error": {"fog": near64(50.0)}, "relative_mce": None}


def test_revisited_map():
    found, given = record("revisited_retrieval")
    ours = ev.revisited_map(**given, ground_truth=found["inputs"]["ground_truth"], k=(1, 5, 10))
    for setup, expected in found["value"].items():
        assert ours[setup]["map"] == near64(expected["map"])
        assert [ap is None for ap in ours[setup]["aps"]] == [ap is None for ap in expected["aps"]]
        known = [(a, b) for a, b in zip(ours[setup]["aps"], expected["aps"], strict=True) if b is not None]
        assert [a for a, _ in known] == near64([b for _, b in known])
        assert {str(k): value for k, value in ours[setup]["mp_at"].items()} == near64(expected["mp_at"])


def test_image_text_recall():
    found, given = record("image_text_recall")
    ours = ev.image_text_recall(**given, text_image=torch.tensor(found["inputs"]["text_image"]), k=[1, 5])
    assert ours == near(found["value"])


def test_one_text_per_image_gives_the_recall_of_the_metric():
    a, b = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    metric = metrics.RetrievalRecall(k=(1, 5), both_ways=True)
    metric.update(a, b)
    theirs = metric.compute()
    ours = ev.image_text_recall(a, b, torch.arange(40), k=(1, 5))
    assert ours["text_at_5"] == near(theirs["to_gallery/recall@5"].item())
    assert ours["image_at_1"] == near(theirs["to_queries/recall@1"].item())


def test_winoground():
    found, given = record("winoground")
    assert ev.winoground_scores(**given) == near64(found["value"])


@pytest.mark.parametrize(
    ("scores", "text", "image"),
    [
        ([[0.9, 0.2], [0.1, 0.8]], 1, 1),
        ([[0.1, 0.8], [0.9, 0.2]], 0, 0),
        ([[0.5, 0.9], [0.4, 0.95]], 1, 0),  # the second image is preferred by both captions
        ([[0.5, 0.4], [0.9, 0.95]], 0, 1),  # the second caption is preferred by both images
        ([[0.5, 0.5], [0.5, 0.5]], 0, 0),  # ties are wrong
    ],
)
def test_winoground_by_hand(scores, text, image):
    expected = {"text": text, "image": image, "group": text * image}
    assert ev.winoground_scores(torch.tensor([scores])) == expected
    assert ev.winoground_scores(torch.tensor([scores]), tie=0.01) == expected


def test_winoground_of_what_differs_by_rounding():
    scores = torch.tensor([[[0.5 + 1e-6, 0.5], [0.5, 0.5 + 1e-6]]])
    assert ev.winoground_scores(scores) == {"text": 1, "image": 1, "group": 1}
    assert ev.winoground_scores(scores, tie=1e-5) == {"text": 0, "image": 0, "group": 0}


def test_winoground_by_chance():
    found = ev.winoground_scores(torch.randn(100_000, 2, 2, generator=torch.Generator().manual_seed(0)))
    for name, chance in {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}.items():
        assert abs(found[name] - chance) < 0.01, name


def test_dense_vote():
    found, given = record("dense_knn_vote", torch.float32)
    ours = metrics.neighbour_vote(**given, **found["params"])
    torch.testing.assert_close(ours, torch.tensor(found["value"]), **f32(TRAINING))


def test_spectrum_and_alignment_of_kernels():
    found, given = record("rankme")
    features = given["features"]
    value = found["value"]
    assert metrics.rankme(features).item() == near64(value["paper_singular_values_uncentred_eps_1e-7"], TRAINING**2)
    assert metrics.effective_rank(features).item() == near64(value["effective_rank_eps_0"], TRAINING**2)
    for name, expected in found["alpha_req"].items():
        first, last = (int(part) for part in name.removeprefix("ranks_").split("_to_"))
        ours = metrics.alpha_req(features, fit_range=(first, last)).item()
        assert ours == pytest.approx(expected, rel=1e-3)  # float32 in the program
    found, given = record("lidar")
    ours = metrics.lidar(given["features"], delta=found["params"]["delta"]).item()
    assert ours == near(found["value"]["formula_population_covariances_eps_1e-7"])


def test_cka():
    found, given = record("cka")
    x, y, value = given["x"], given["y"], found["value"]
    ours = {
        "linear": metrics.cka(x, y),
        "linear_features": metrics.cka(x, y),
        "linear_debiased": metrics.cka(x, y, unbiased=True),
        "linear_debiased_features": metrics.cka(x, y, unbiased=True),
        "rbf_half_median": metrics.cka(x, y, kernel="rbf", rbf_threshold=0.5),
        "rbf_half_median_debiased": metrics.cka(x, y, kernel="rbf", unbiased=True),
    }
    metric = metrics.CKA()
    for start in range(0, 24, 8):
        metric.update(x[start : start + 8], y[start : start + 8])
    ours["minibatch_8"] = metric.compute()
    assert {name: number.item() for name, number in ours.items()} == near64(value, 2**24)
    with pytest.raises(ValueError, match="`kernel` must be one of"):
        metrics.cka(x, y, kernel="cosine")


def test_knn():
    found, given = record("knn", torch.float32)
    bank, labels, queries = given["bank"], given["bank_labels"], given["queries"]
    options = {"num_classes": 5, "temperature": 0.07}
    for name, expected in found["dino_top1"].items():
        predicted = metrics.knn_predict(queries, bank, labels, k=int(name[1:]), **options)
        assert 100 * (predicted == given["query_labels"]).double().mean().item() == near(expected)
    scores = metrics.knn_scores(queries[:5], bank, labels, k=20, **options)
    torch.testing.assert_close(scores, torch.tensor(found["dinov2_scores"]["k20"]), rtol=0, atol=CONVERGED)


LOGITS, LABELS = torch.eye(3), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ev.calibration_error(LOGITS, LABELS + 1), "`labels` must lie in 0..2"),
        (lambda: ev.calibration_error(LOGITS, LABELS[:2]), "`labels` must be integers of shape"),
        (lambda: ev.calibration_error(LOGITS, LABELS, bins=0), "`bins` must be >= 1"),
        (lambda: ev.aurra(torch.rand(3), torch.rand(2)), "`correct` must have the shape"),
        (lambda: ev.rms_calibration_error(torch.rand(0), torch.rand(0)), "`correct` must have the shape"),
        (lambda: ev.ood_metrics(torch.rand(3), torch.tensor([math.nan])), "`out_scores` must be finite"),
        (lambda: ev.ood_metrics(torch.rand(3), torch.rand(3), tpr=0), "`tpr` must lie in"),
        (lambda: ev.conformal_threshold(LOGITS, LABELS, alpha=1.0), "`alpha` must lie in"),
        (lambda: ev.conformal_sets(LOGITS[0], 0.5), "`probabilities` must be floating"),
        (lambda: ev.conformal_sets(LOGITS, 0.5, penalty=-1.0), "`penalty` must be >= 0"),
        (lambda: ev.mean_corruption_error({"fog": [50]}, baseline_errors={"fog": 0.8}), "must be accuracies in 0..1"),
        (lambda: ev.mean_corruption_error({"fog": [0.5]}, baseline_errors={}), "`baseline_errors` must hold"),
        (
            lambda: ev.mean_corruption_error({"fog": [0.5]}, baseline_errors={"fog": 0.8}, clean_error=0.2),
            "`baseline_clean_error` must be given",
        ),
        (lambda: ev.revisited_map(LOGITS, LOGITS, [{}]), "`ground_truth` must hold 3 dicts"),
        (lambda: ev.revisited_map(LOGITS[:1], LOGITS, [{"easy": [3]}]), "`ground_truth` must name rows in 0..2"),
        (lambda: ev.image_text_recall(LOGITS, LOGITS, torch.tensor([0, 0, 1]), k=1), "`text_image` must name each"),
        (lambda: ev.image_text_recall(LOGITS, LOGITS, LABELS, k=4), "`k` must be <= 3"),
        (lambda: ev.winoground_scores(LOGITS), "`scores` must be"),
        (lambda: ev.winoground_scores(LOGITS.new_zeros(1, 2, 2), tie=-1.0), "`tie` must be >= 0"),
        (lambda: metrics.neighbour_vote(LOGITS, LOGITS, LOGITS, temperature=0.1), "`neighbours` must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scores_of_half_precision_give_the_same_values():
    found, given = record("ece", torch.float32)
    value = ev.calibration_error(**given)
    assert value.dtype == torch.float64
    assert value.item() == near(found["value"], NETWORK)
    torch.testing.assert_close(value, torch.tensor(found["value"], dtype=torch.float64), **f64(2**34))
