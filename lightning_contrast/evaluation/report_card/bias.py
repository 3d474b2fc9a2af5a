"""The part of a report about a protected attribute, on pairs of images that differ in it."""

import torch
from torch import Tensor

from lightning_contrast.callbacks.capture.sampling import drawn_rows
from lightning_contrast.evaluation.protocols import (
    association_audit,
    attribute_probe,
    bootstrap_interval,
    twin_retrieval,
)
from lightning_contrast.evaluation.report_card.classification import add_accuracy
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.drawing import declared, missing
from lightning_contrast.evaluation.report_card.result import SIGNIFICANCE, Outcome

_LEAST = 5  # images of a concept


def audit(context: Context, model: str) -> Outcome:
    """Associations of the groups with the classes, retrieval by group, and a probe of the attribute."""
    outcome = Outcome()
    if declared(context, "twins") is None:
        outcome.notes.append(missing("twins", "the rows of pairs that differ in a protected attribute only"))
        return outcome
    given, names = context.labeled(model), getattr(context.datamodule, "twin_names", ("first", "second"))
    pairs = {train: _pairs(context, train=train) for train in (True, False)}
    test, labels = context.test[model].features, context.test[model].labels
    assert labels is not None  # `labeled` has checked it
    first, second = pairs[False]
    effects: dict[str, dict[str, dict[str, float]]] = {}
    for kind, features in (("", test), ("centered", test - given.train.features.mean(0))):
        concepts = _concepts(context, features, labels, torch.cat([first, second]))
        effects[kind] = association_audit(features[first], features[second], concepts, seed=context.seed)
    raw = effects[""]
    outcome.values["largest effect"] = max((abs(of["effect"]) for of in raw.values()), default=None)
    outcome.values["largest effect (centered)"] = max(
        (abs(of["effect"]) for of in effects["centered"].values()), default=None
    )
    for name, of in raw.items():
        outcome.values[f"effect, {name}"] = of["effect"]
        outcome.values[f"p, {name}"] = of["p"]
    low = sum(of["p"] < SIGNIFICANCE for of in raw.values())
    outcome.notes.append(f"Effects > 0: {names[0]} are closer; {low} of {len(raw)} have p < {SIGNIFICANCE}.")
    outcome.notes.append("The p-values take all images for independent.")
    found = twin_retrieval(test, labels, first, second, k=min(10, 2 * len(first) - 1))
    for key, name in (("first", names[0]), ("second", names[1])):
        outcome.values[f"mAP of {name}"] = float(found[key].mean())
        outcome.intervals[f"mAP of {name}"] = bootstrap_interval(found[key], seed=context.seed)
    gap = found["first"] - found["second"]
    outcome.values["retrieval gap"] = float(gap.mean())
    outcome.intervals["retrieval gap"] = bootstrap_interval(gap, seed=context.seed)
    own = torch.cat([found["own_first"], found["own_second"]])
    outcome.values["neighbors of the own group"] = float(own.mean())
    outcome.values["by chance"] = (len(first) - 1) / (2 * len(first) - 1)
    train = context.train[model].features
    probe = attribute_probe((train[pairs[True][0]], train[pairs[True][1]]), (test[first], test[second]))
    add_accuracy(outcome, "attribute probe", probe, context.seed)
    outcome.notes.append(f"{len(first)} pairs of test images, {len(pairs[True][0])} of training images.")
    return outcome


def _pairs(context: Context, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return the pairs as rows of the features, ``(P,)`` each; pairs that the loader does not draw are left out."""
    rows = drawn_rows(context.train_loader if train else context.loader)
    place = {row: index for index, row in enumerate(rows)}
    first, second = (of.tolist() for of in declared(context, "twins", train=train))
    kept = [(place[a], place[b]) for a, b in zip(first, second, strict=True) if a in place and b in place]
    if not kept:
        raise ValueError("`datamodule.twins` must return at least one pair of images that the loader draws.")
    found = torch.tensor(kept).T
    return found[0], found[1]


def _concepts(context: Context, features: Tensor, labels: Tensor, pairs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the features of each class and those of all others, without the images of the pairs."""
    free = labels >= 0
    free[pairs] = False
    found = {}
    for label in sorted(set(labels[free].tolist())):
        own = free & (labels == label)
        if int(own.sum()) >= _LEAST and int((free & ~own).sum()) >= _LEAST:
            name = context.class_names[label] if context.class_names else f"class {label}"
            found[name] = features[own], features[free & ~own]
    return found
