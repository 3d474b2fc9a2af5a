"""Parts of a report about images that are changed or foreign."""

import torch
from torch import Tensor

from lightning_contrast.augment.corruptions import CORRUPTIONS, corrupt
from lightning_contrast.callbacks.invariance.perturbations import CHANGES, changed, fitting_changes
from lightning_contrast.evaluation.measures.out_of_distribution import ood_metrics
from lightning_contrast.evaluation.measures.robustness import mean_corruption_error
from lightning_contrast.evaluation.protocols import logistic_probe, ood_scores
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean, correct

SMALL = 64
"""Images up to this edge get the severities of CIFAR-10-C, larger ones those of ImageNet-C."""
_CACHE_BYTES = 256 * 2**20
_CLASSES = 10


def corruptions(context: Context, model: str) -> Outcome:
    """Accuracy of a logistic classifier of clean images on corrupted ones."""
    given = context.labeled(model)
    images, labels = context.unit_images(model, int(context.options["corrupted_images"]))
    if labels is None:
        raise ValueError("`datamodule` must yield labels for this part.")
    known = labels >= 0
    images, labels = (images[known] * 255).round().to(torch.uint8), labels[known]
    severities = tuple(context.options["severities"])
    stack = [context.encode(model, images)]
    for name in CORRUPTIONS:
        stack += [context.encode(model, _corrupted(context, images, name, severity)) for severity in severities]
    repeated = labels.repeat(len(stack))
    found = logistic_probe(*given.train, torch.cat(stack), repeated, c=0.1, standardize=True)
    right = correct(found.logits, found.labels).view(len(stack), len(labels)).double()
    clean, accuracies, row = float(right[0].mean()), {}, 1
    for name in CORRUPTIONS:
        accuracies[name] = [float(part.mean()) for part in right[row : row + len(severities)]]
        row += len(severities)
    outcome = Outcome()
    add_mean(outcome, "mean accuracy", right[1:].mean(0).cpu(), context.seed)
    outcome.values["clean accuracy"] = clean
    outcome.values["accuracy lost"] = clean - float(right[1:].mean())
    outcome.values |= {name.replace("_", " "): sum(of) / len(of) for name, of in accuracies.items()}
    mean = right[1:].view(len(CORRUPTIONS), len(severities), -1).mean((0, 2)).tolist()
    outcome.curves["accuracy by severity"] = [(0, clean), *zip(severities, mean, strict=True)]
    reference = next(iter(context.subjects))
    of_reference = context.outcomes.get("corruptions", {}).get(reference)
    errors = _errors(outcome if model == reference else of_reference)
    if errors:
        ratio = mean_corruption_error(accuracies, baseline_errors=errors)["mce"]
        outcome.values[f"mCE against {reference} (%)"] = float(ratio) if isinstance(ratio, float) else None
    table = _table(images)
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


def _table(images: Tensor) -> str:
    return "CIFAR-10-C" if max(images.shape[-2:]) <= SMALL else "ImageNet-C"


def _corrupted(context: Context, images: Tensor, name: str, severity: int) -> Tensor:
    """Return corrupted images ``(n, C, H, W)``, computed once for all models if they fit into memory."""
    key = f"{name} {severity}"
    if key in context.memory:
        found: Tensor = context.memory[key]
        return found
    table = "cifar" if _table(images) == "CIFAR-10-C" else "imagenet"
    found = torch.cat(
        [
            corrupt(part, name, severity=severity, seed=context.seed + 64 * place, table=table)  # type: ignore[arg-type]
            for place, part in enumerate(torch.split(images, 64))
        ]
    )
    if images.numel() * len(CORRUPTIONS) * 5 <= _CACHE_BYTES:
        context.memory[key] = found
    return found


def anomalies(context: Context, model: str) -> Outcome:
    """Detection of a class that is left out of the training images."""
    given, outcome = context.labeled(model), Outcome()
    classes = sorted(set(given.train.labels.tolist()) & set(given.test.labels.tolist()))[:_CLASSES]
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
