"""Parts of a report about images that were made to mislead: attacks, planted shortcuts, conflicting cues."""

import torch
from torch import Tensor

from lightning_contrast.evaluation.protocols import (
    cue_conflict_images,
    logistic_head,
    pgd_robustness,
    shape_decisions,
    shortcut_test,
)
from lightning_contrast.evaluation.protocols.shortcuts import Shortcut
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.drawing import aligned, declared, drawn, missing, spaced
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean
from lightning_contrast.metrics import wilson_interval

EPSILONS = (2, 4, 8, 16, 64)
"""Largest changes of a pixel, in 1/255."""
_MASKED = 64  # a change by which every network without masked gradients is fooled
_CUE_IMAGES = 2048


def attacks(context: Context, model: str) -> Outcome:
    """Accuracy of a linear head under PGD on the images."""
    given, outcome = context.labeled(model), Outcome()
    places = spaced(context.test[model].labels, int(context.options["attacked_images"]))
    images, labels = drawn(context, places)
    pixels = context.unit_range(model, images)
    head = logistic_head(*given.train)
    subject, steps = context.subjects[model], int(context.options["attack_steps"])
    line: list[tuple[float, float]] = []
    for epsilon in EPSILONS:
        found = pgd_robustness(
            subject.module,
            head,
            pixels,
            labels,
            preprocess=subject.preprocess,
            epsilon=epsilon / 255,
            steps=steps,
            seed=context.seed,
        )
        if not line:
            add_mean(outcome, "clean accuracy", found["clean"], context.seed)
            line.append((0.0, float(found["clean"].double().mean())))
        add_mean(outcome, f"robust accuracy ({epsilon}/255)", found["robust"], context.seed)
        line.append((float(epsilon), float(found["robust"].double().mean())))
    outcome.curves["accuracy by epsilon"] = line
    outcome.notes.append(f"{len(labels)} test images, {steps} steps of 2.5 epsilon / {steps}, one random start.")
    left = dict(line)[_MASKED]
    if left > 0.1:
        outcome.notes.append(
            f"{left:.0%} survive {_MASKED}/255, which hides any image: the gradients are masked and the figures void."
        )
    return outcome


def shortcuts(context: Context, model: str) -> Outcome:
    """Accuracy where a color that gave the label away in training is right, wrong or absent."""
    outcome = Outcome()
    context.labeled(model)  # names missing labels
    train, test = context.train[model].labels, context.test[model].labels
    places = [
        spaced(labels, int(context.options[name]))
        for labels, name in ((train, "shortcut_train_images"), (test, "shortcut_test_images"))
    ]
    sets = [drawn(context, own, train=place == 0) for place, own in enumerate(places)]
    given = [(context.unit_range(model, images), labels) for images, labels in sets]
    kinds: dict[Shortcut, tuple[Tensor, Tensor] | None] = {"tag": None}
    masks = [declared(context, "masks", train=train) for train in (True, False)]
    if all(mask is not None for mask in masks):
        pair = [aligned(context, mask, "masks", train=place == 0)[places[place]] for place, mask in enumerate(masks)]
        kinds["background"] = pair[0], pair[1]
    else:
        outcome.notes.append("Without masks of the objects, no background is planted.")
    words = {"swapped": "{} swapped", "right": "{} right", "absent": "{} absent", "fooled": "taken for the {}"}
    for kind, own in kinds.items():
        found = shortcut_test(
            lambda images: context.encode(model, images), *given[0], *given[1], kind=kind, masks=own, seed=context.seed
        )
        for key, text in words.items():
            add_mean(outcome, text.format(kind), found[key], context.seed)
        if kind == "tag":
            add_mean(outcome, "nothing planted", found["clean"], context.seed)
    numbers = [len(labels) for _, labels in given]
    outcome.notes.append(f"{numbers[0]} training and {numbers[1]} test images.")
    return outcome


def cues(context: Context, model: str) -> Outcome:
    """Whether the outline or the texture decides where they disagree."""
    outcome, masks = Outcome(), declared(context, "masks")
    if masks is None:
        outcome.notes.append(missing("masks", "the pixels of the objects, bool (N, H, W)"))
        return outcome
    given = context.labeled(model)
    places = spaced(context.test[model].labels, _CUE_IMAGES)
    images, labels = drawn(context, places)
    made, shapes, textures = cue_conflict_images(
        context.unit_range(model, images),
        aligned(context, masks, "masks")[places],
        labels,
        count=int(context.options["cue_images"]),
        seed=context.seed,
    )
    with torch.no_grad():
        predictions = logistic_head(*given.train)(context.encode(model, made)).argmax(1)
    found = shape_decisions(predictions, shapes, textures)
    either = int(found["shape"] + found["texture"])
    outcome.values["shape share"] = found["share"] if either else None
    if either:
        low, high = wilson_interval(torch.tensor(int(found["shape"])), torch.tensor(either))
        outcome.intervals["shape share"] = float(low), float(high)
    add_mean(outcome, "decided by shape", predictions == shapes, context.seed)
    add_mean(outcome, "decided by texture", predictions == textures, context.seed)
    outcome.per_image.clear()  # neither is better
    outcome.values["decided by neither"] = found["other"] / len(made)
    outcome.notes.append(f"{len(made)} made images of {given.num_classes} classes; interval by Wilson.")
    return outcome
