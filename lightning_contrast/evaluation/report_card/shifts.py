"""Parts of a report about other data: other sets, a long tail of classes, and groups that were not seen."""

import torch
from torch import Tensor

from lightning_contrast._checks import fail
from lightning_contrast.evaluation.feature_pass.cache import cached_features
from lightning_contrast.evaluation.protocols import (
    class_mean_accuracy,
    knn_sweep,
    logistic_sweep,
    long_tail,
    unseen_groups,
)
from lightning_contrast.evaluation.protocols.inputs import split
from lightning_contrast.evaluation.report_card.classification import add_accuracy
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.drawing import aligned, declared, missing, transfer_loaders
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean, correct

_MOST_GROUPS = 20
_LEAST = 5  # test images of a group


def other_sets(context: Context, model: str) -> Outcome:
    """Linear probe and k-NN on other DataModules."""
    if not context.transfer:
        fail("transfer", "hold DataModules for this part", {}, 'Give `transfer={"name": datamodule}`')
    outcome, failed = Outcome(), ""
    steps, max_iter = int(context.options["sweep_steps"]), int(context.options["max_iter"])
    for name in context.transfer:
        try:
            sets = [
                cached_features(context.subjects[model], loader, folder=context.folder, progress=False)
                for loader in transfer_loaders(context, name)
            ]
            given = split(sets[0].features, sets[0].labels, sets[1].features, sets[1].labels)
            swept = logistic_sweep(*given.train, *given.test, seed=context.seed, steps=steps, max_iter=max_iter)
            k = min(20, len(given.train.labels))
            voted = knn_sweep(*given.train, *given.test, k=(k,))[k, 0.07]
        except torch.OutOfMemoryError:
            raise  # says nothing about the data
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            failed = f"{name}: {' '.join(str(error).split())}"
            outcome.notes.append(f"Failed for {failed}")
            continue
        add_accuracy(outcome, f"{name}, linear top1", swept, context.seed)
        add_accuracy(outcome, f"{name}, k-NN top1 (k = {k})", voted, context.seed)
        outcome.notes.append(f"{name}: {len(given.train.labels)} training and {len(given.test.labels)} test images.")
    if not outcome.values:
        raise ValueError(failed)
    linear = [value or 0.0 for name, value in outcome.values.items() if name.endswith("linear top1")]
    outcome.values = {"mean linear top1": sum(linear) / len(linear), **outcome.values}
    return outcome


def tail(context: Context, model: str) -> Outcome:
    """Classifier of a training subset with a long tail, judged on frequent and rare classes."""
    given, outcome = context.labeled(model), Outcome()
    found = long_tail(*given.train, *given.test, imbalance=float(context.options["imbalance"]), seed=context.seed)
    result, counts = found["result"], found["counts"]
    right = correct(result.logits, result.labels)
    names = {"all": "mean of classes", "many": "many-shot", "medium": "medium-shot", "few": "few-shot"}
    for key, name in names.items():
        classes = found[key]
        if not classes:
            outcome.notes.append(f"No {name} class has test images.")
            continue
        shares = class_mean_accuracy(right, result.labels, classes, seed=context.seed)
        outcome.values[name] = shares["accuracy"]
        outcome.intervals[name] = shares["low"], shares["high"]
    add_mean(outcome, "top1 (mean of images)", right, context.seed)
    outcome.curves["accuracy by training images"] = sorted(
        (float(counts[label]), float(right[result.labels == label].double().mean())) for label in found["all"]
    )
    present = counts[counts > 0]
    sizes = f"{int(present.max())} to {int(present.min())}"
    outcome.notes.append(f"{int(counts.sum())} training images, {sizes} per class; many: over 100, few: under 20.")
    return outcome


def groups_left_out(context: Context, model: str) -> Outcome:
    """Accuracy on groups of which the classifier saw no image."""
    context.labeled(model)  # names missing labels
    train, test = context.train[model], context.test[model]
    assert train.labels is not None
    assert test.labels is not None
    columns = _groups(context, model)
    outcome = Outcome()
    if not columns:
        outcome.notes.append(missing("image_groups", "groups of the images by name, and no other column of integers"))
        return outcome
    for name, (of_train, of_test) in columns.items():
        if len(set(of_train[of_train >= 0].tolist())) > _MOST_GROUPS:
            outcome.notes.append(f"{name}: more than {_MOST_GROUPS} groups.")
            continue
        given = (train.features, train.labels, of_train, test.features, test.labels, of_test)
        try:
            found = unseen_groups(*given, least=_LEAST, seed=context.seed)
        except ValueError as error:
            outcome.notes.append(f"{name}: {error}")
            continue
        gaps: list[Tensor] = []
        for group, of in found.items():
            unseen, seen = (correct(of[key].logits, of[key].labels) for key in ("unseen", "seen"))
            add_mean(outcome, f"{name} {group}, unseen", unseen, context.seed)
            add_mean(outcome, f"{name} {group}, seen", seen, context.seed)
            gaps.append(seen.double() - unseen.double())
            sizes = " and ".join(str(number) for number in of["images"])
            outcome.notes.append(f"{name} {group}: {len(unseen)} test images; {sizes} training images.")
        add_mean(outcome, f"lost on unseen {name}", torch.cat(gaps), context.seed)
    return outcome


def _groups(context: Context, model: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return groups of the training and test images by name: columns of integers, and `image_groups`."""
    train, test = context.train[model].columns, context.test[model].columns
    whole = [name for name in train if name in test and not train[name].is_floating_point()]
    found = {name: (train[name].long(), test[name].long()) for name in whole}
    sets = [declared(context, "image_groups", train=of_train) or {} for of_train in (True, False)]
    for name in sets[0]:
        if name in sets[1]:
            pair = [aligned(context, of[name], "image_groups", train=place == 0) for place, of in enumerate(sets)]
            found[name] = pair[0].long(), pair[1].long()
    return found
