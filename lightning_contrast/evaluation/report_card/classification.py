"""Parts of a report about classification from few or many labels."""

import torch
from torch import Tensor

from lightning_contrast.evaluation.measures.calibration import aurra, calibration_error
from lightning_contrast.evaluation.protocols import (
    ProbeResult,
    few_shot,
    knn_sweep,
    label_efficiency,
    linear_grid,
    linear_probe,
    logistic_sweep,
    split_conformal,
    worst_group_accuracy,
)
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.drawing import aligned, declared
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean, correct

KS = (1, 5, 10, 20, 100, 200)
SGD_PROTOCOLS = ("simclr", "moco", "mae")
SHARES = (0.01, 0.1, 0.5, 1.0)
_LEAST = 5  # test images of a group


def add_accuracy(outcome: Outcome, name: str, found: ProbeResult, seed: int) -> Tensor:
    """Add an accuracy with its bootstrap interval, and return which images are right, bool ``(N,)``.

    Args:
        outcome: Gets the value.
        name: Name of the value.
        found: What a probe gave.
        seed: Seed of the interval.
    """
    right = correct(found.logits, found.labels)
    add_mean(outcome, name, right, seed)
    return right


def knn(context: Context, model: str) -> Outcome:
    """Weighted k-NN for several k."""
    given = context.labeled(model)
    rows = len(given.train.labels)
    ks = [k for k in KS if k <= rows]
    found = knn_sweep(*given.train, *given.test, k=ks, temperature=(0.07,))
    outcome = Outcome(curves={"accuracy": [(k, found[k, 0.07].top1) for k in ks]})
    headline = 20 if 20 in ks else ks[-1]
    add_accuracy(outcome, f"top1 (k = {headline})", found[headline, 0.07], context.seed)
    for k in ks:
        outcome.values.setdefault(f"top1 (k = {k})", found[k, 0.07].top1)
    return outcome


def linear(context: Context, model: str) -> Outcome:
    """Logistic regression with CLIP's sweep, and probes by SGD in published protocols."""
    given, outcome = context.labeled(model), Outcome()
    steps = int(context.options["sweep_steps"])
    swept = logistic_sweep(
        *given.train, *given.test, seed=context.seed, steps=steps, max_iter=int(context.options["max_iter"])
    )
    right = add_accuracy(outcome, "top1", swept, context.seed)
    per_class = [right[swept.labels == label] for label in range(given.num_classes)]
    shares = [(float(label), float(own.double().mean())) for label, own in enumerate(per_class) if len(own)]
    outcome.curves["accuracy by class"] = shares
    outcome.notes.append(f"C = {swept.settings['c']:.3g}, chosen on held-out training images.")
    for name in SGD_PROTOCOLS:
        # The large batches of the papers would leave a small set with a handful of steps.
        found = linear_probe(*given.train, *given.test, protocol=name, batch_size=256, seed=context.seed)
        add_accuracy(outcome, f"top1 ({name} protocol)", found, context.seed)
    return outcome


def grid(context: Context, model: str) -> Outcome:
    """DINOv2's grid of linear heads."""
    given, outcome = context.labeled(model), Outcome()
    steps = int(context.options["grid_steps"])
    found = linear_grid(*given.train, *given.test, steps=steps, seed=context.seed)
    add_accuracy(outcome, "top1", found, context.seed)
    outcome.notes.append(f"{found.settings['head']} of 13 heads, chosen on held-out training images; {steps} steps.")
    return outcome


def shots(context: Context, model: str) -> Outcome:
    """Episodes of one and five shots."""
    given, outcome = context.labeled(model), Outcome()
    ways = min(5, len(set(given.test.labels.tolist())))
    mean = given.train.features.mean(0)
    for number in (1, 5):
        found = few_shot(*given.test, shots=number, ways=ways, mean=mean, seed=context.seed)
        name = f"{ways}-way {number}-shot"
        outcome.values[name] = found["accuracy"]
        low, high = (found["accuracy"] + sign * found["interval"] for sign in (-1, 1))
        outcome.intervals[name] = low, high
        outcome.per_image[name] = torch.tensor(found["episodes"], dtype=torch.float64)  # the same episodes for all
    return outcome


def efficiency(context: Context, model: str) -> Outcome:
    """Accuracy for shares of the labels."""
    given, outcome = context.labeled(model), Outcome()
    found = label_efficiency(*given.train, *given.test, shares=SHARES, seed=context.seed)
    ranges = []
    for share, of in found.items():
        name = f"top1 with {share:.0%} of the labels ({of['images']:.0f})"
        outcome.values[name] = of["accuracy"]
        if of["highest"] > of["lowest"]:
            ranges.append(f"{share:.0%} {of['lowest']:.3f} to {of['highest']:.3f}")
    if ranges:
        outcome.notes.append(f"Lowest and highest draw: {', '.join(ranges)}.")
    outcome.curves["accuracy"] = [(of["images"], of["accuracy"]) for of in found.values()]
    return outcome


def calibration(context: Context, model: str) -> Outcome:
    """Calibration of a logistic classifier."""
    found, outcome = context.classifier(model), Outcome()
    probabilities = found.logits.double().softmax(1)
    confidence, right = probabilities.amax(1), correct(found.logits, found.labels)
    outcome.values["ECE (15 bins)"] = float(calibration_error(found.logits, found.labels))
    picked = probabilities.gather(1, found.labels.unsqueeze(1)).squeeze(1)
    add_mean(outcome, "negative log-likelihood", -picked.clamp(min=1e-12).log().cpu(), context.seed)
    truth = torch.nn.functional.one_hot(found.labels, probabilities.shape[1])
    add_mean(outcome, "Brier score", (probabilities - truth).square().sum(1).cpu(), context.seed)
    outcome.values["AURRA"] = float(aurra(confidence, right))
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    place = (torch.bucketize(confidence, edges) - 1).clamp(0, 9)
    bins = [(confidence[place == i], right[place == i].double()) for i in range(10)]
    outcome.curves["accuracy by confidence"] = [(float(c.mean()), float(r.mean())) for c, r in bins if len(c)]
    return outcome


def conformal(context: Context, model: str) -> Outcome:
    """Conformal sets of a logistic classifier."""
    found, outcome = context.classifier(model), Outcome()
    sets = split_conformal(found.logits.double().softmax(1), found.labels, alpha=0.1, seed=context.seed)
    outcome.values["mean set size"] = sets["size"]
    outcome.values["coverage (90 % promised)"] = sets["coverage"]
    return outcome


def groups(context: Context, model: str) -> Outcome:
    """Worst class, and worst group of each column of the batches and of `image_groups`."""
    found, outcome = context.classifier(model), Outcome()
    right, test = correct(found.logits, found.labels), context.test[model]
    columns = {"class": found.labels}
    if test.labels is not None:
        known = test.labels >= 0
        declared_groups = declared(context, "image_groups") or {}
        of_images = {name: aligned(context, of, "image_groups") for name, of in declared_groups.items()}
        columns |= {name: of[known] for name, of in (test.columns | of_images).items() if not of.is_floating_point()}
    for name, column in columns.items():
        try:
            worst = worst_group_accuracy(right, column, least=_LEAST)
        except ValueError:  # such as a column of identifiers
            outcome.notes.append(f"{name}: no group has {_LEAST} test images.")
            continue
        label = context.class_names[int(worst["group"])] if name == "class" and context.class_names else worst["group"]
        outcome.values[f"worst {name}"] = worst["accuracy"]
        outcome.values[f"mean minus worst {name}"] = worst["mean"] - worst["accuracy"]
        outcome.notes.append(f"Worst {name}: {label} ({worst['images']:.0f} images).")
    return outcome
