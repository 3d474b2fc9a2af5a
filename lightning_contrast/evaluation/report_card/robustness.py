"""Parts of a report about images that are changed or foreign."""

import torch

from lightning_contrast._checks import require
from lightning_contrast.augment.corruptions import CORRUPTIONS, HELD_OUT_CORRUPTIONS
from lightning_contrast.callbacks.invariance.perturbations import CHANGES, changed, fitting_changes
from lightning_contrast.evaluation.measures.out_of_distribution import ood_metrics
from lightning_contrast.evaluation.measures.robustness import mean_corruption_error
from lightning_contrast.evaluation.protocols import corruption_robustness, logistic_head, ood_scores
from lightning_contrast.evaluation.protocols.corruption import SMALL
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean

_CACHE_BYTES = 256 * 2**20
_CLASSES = 10


def corruptions(context: Context, model: str) -> Outcome:
    """Accuracy of a logistic classifier of clean images on corrupted ones."""
    given = context.labeled(model)
    images, labels = context.unit_images(model, int(context.options["corrupted_images"]))
    assert labels is not None
    known = labels >= 0
    images, labels = (images[known] * 255).round().to(torch.uint8), labels[known]
    severities = tuple(context.options["severities"])
    names = (*CORRUPTIONS, *(HELD_OUT_CORRUPTIONS if context.options["held_out_corruptions"] else ()))
    head = logistic_head(*given.train)
    small = images.numel() * len(names) * len(severities) <= _CACHE_BYTES
    found = corruption_robustness(
        lambda given: head(context.encode(model, given)),
        images,
        labels,
        corruptions=names,
        severities=severities,
        seed=context.seed,
        cache=context.memory.setdefault("corrupted", {}) if small else None,
    )
    clean = float(found["clean"].double().mean())
    benchmark = torch.stack([found[name] for name in CORRUPTIONS]).double()  # (corruptions, severities, images)
    outcome = Outcome()
    add_mean(outcome, "mean accuracy", benchmark.mean((0, 1)), context.seed)
    outcome.values["clean accuracy"] = clean
    outcome.values["accuracy lost"] = clean - float(benchmark.mean())
    if len(names) > len(CORRUPTIONS):
        held_out = torch.stack([found[name] for name in HELD_OUT_CORRUPTIONS]).double()
        add_mean(outcome, "mean accuracy, held-out corruptions", held_out.mean((0, 1)), context.seed)
    outcome.values |= {name.replace("_", " "): float(found[name].double().mean()) for name in names}
    by_severity = benchmark.mean((0, 2)).tolist()
    outcome.curves["accuracy by severity"] = [(0, clean), *zip(severities, by_severity, strict=True)]
    reference = next(iter(context.subjects))
    of_reference = context.outcomes.get("corruptions", {}).get(reference)
    errors = _errors(outcome if model == reference else of_reference)
    if errors:
        accuracies = {name: found[name].double().mean(1).tolist() for name in CORRUPTIONS}
        ratio = mean_corruption_error(accuracies, baseline_errors=errors)["mce"]
        outcome.values[f"mCE against {reference} (%)"] = float(ratio) if isinstance(ratio, float) else None
    else:
        outcome.notes.append(f"No mCE: {reference} failed, or makes no errors with one of the corruptions.")
    table = "CIFAR-10-C" if max(images.shape[-2:]) <= SMALL else "ImageNet-C"
    outcome.notes.append(
        f"{len(labels)} test images, severities {severities} of {table}; frost is a generated texture."
    )
    return outcome


def _errors(outcome: Outcome | None) -> dict[str, float] | None:
    """Return the errors of a model by corruption, or None if one is 0."""
    if outcome is None:
        return None
    errors = {name: 1 - float(outcome.values[name.replace("_", " ")] or 0.0) for name in CORRUPTIONS}
    return errors if all(error > 0 for error in errors.values()) else None


def anomalies(context: Context, model: str) -> Outcome:
    """Detection of a class that is left out of the training images."""
    given, outcome = context.labeled(model), Outcome()
    judged = set(given.test.labels.tolist())
    hint = "Images of other classes are compared with those of the class that is left out"
    require(len(judged) > 1, "test_labels", "hold two classes or more", f"only class {min(judged)}", hint)
    classes = sorted(set(given.train.labels.tolist()) & judged)
    if len(classes) > _CLASSES:
        outcome.notes.append(f"The first {_CLASSES} of {len(classes)} classes.")
        classes = classes[:_CLASSES]
    sums: dict[str, list[float]] = {"k-NN": [], "Mahalanobis": []}
    for label in classes:
        rest, foreign = given.train.labels != label, given.test.labels == label
        train, labels = given.train.features[rest], given.train.labels[rest]
        scores = {
            "k-NN": ood_scores(train, given.test.features, k=min(50, len(train))),
            "Mahalanobis": ood_scores(train, given.test.features, method="mahalanobis", train_labels=labels),
        }
        for name, score in scores.items():
            sums[name].append(ood_metrics(score[~foreign], score[foreign])["auroc"])
    for name, values in sums.items():
        outcome.values[f"AUROC ({name})"] = sum(values) / len(values)
    outcome.curves["AUROC by class (k-NN)"] = [(float(c), v) for c, v in zip(classes, sums["k-NN"], strict=True)]
    return outcome


def invariance(context: Context, model: str) -> Outcome:
    """Cosine similarity of the features of changed images to those of the originals."""
    images, _ = context.unit_images(model, int(context.options["view_images"]))
    original, outcome = context.encode(model, images), Outcome()
    unit = torch.nn.functional.normalize(original - original.mean(0), dim=1)
    for name, change in fitting_changes(CHANGES, images.shape[1]).items():
        line = []
        for strength in change.strengths:
            found = context.encode(model, changed(images, change, strength)) - original.mean(0)
            line.append((strength, float((unit * torch.nn.functional.normalize(found, dim=1)).sum(1).mean())))
        outcome.curves[name] = line
        outcome.values[name] = sum(value for _, value in line) / len(line)
    mean = sum(value or 0.0 for value in outcome.values.values()) / len(outcome.values)
    outcome.values = {"mean": mean, **outcome.values}
    return outcome
