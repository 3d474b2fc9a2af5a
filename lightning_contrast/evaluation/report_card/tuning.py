"""The part of a report about fine-tuning with few labels."""

from lightning_contrast.evaluation.protocols import fine_tune, fine_tune_rows, logistic_probe
from lightning_contrast.evaluation.report_card.classification import add_accuracy
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.drawing import drawn, spaced
from lightning_contrast.evaluation.report_card.result import Outcome

SHARES = (0.01, 0.1)
_VALIDATION = 1000  # images at most that choose the settings


def fine_tuned(context: Context, model: str) -> Outcome:
    """Fine-tuning with 1 % and 10 % of the labels, and a linear classifier of the same images."""
    given, outcome = context.labeled(model), Outcome()
    labels = context.train[model].labels
    test_places = spaced(context.test[model].labels, int(context.options["tuned_test_images"]))
    test, test_labels = drawn(context, test_places)
    recipe, subject = context.options["recipe"], context.subjects[model]
    known = spaced(labels, len(context.train[model].features))  # rows of `given` among all training images
    for share in SHARES:
        rows, held = fine_tune_rows(given.train.labels, share=share, seed=context.seed)
        held = held[:: max(1, -(-len(held) // _VALIDATION))]
        sets = [drawn(context, [known[row] for row in own.tolist()], train=True) for own in (rows, held) if len(own)]
        sets = [(context.unit_range(model, images), own) for images, own in sets]
        found = fine_tune(
            subject.module,
            *sets[0],
            context.unit_range(model, test),
            test_labels,
            validation=sets[1] if len(sets) > 1 else None,
            recipe=recipe,
            share=share,
            preprocess=subject.preprocess,
            seed=context.seed,
        )
        name = f"{share:.0%} of the labels ({len(rows)})"
        add_accuracy(outcome, f"top1 with {name}", found, context.seed)
        learned = given.train.features[rows], given.train.labels[rows]
        judged = context.test[model].features[test_places], test_labels
        frozen = logistic_probe(*learned, *judged, c=0.1, standardize=True)
        add_accuracy(outcome, f"frozen, {name}", frozen, context.seed)
        chosen = f"chosen on {len(held)} other training images" if found.settings["validation"] else "as published"
        outcome.notes.append(f"{share:.0%}: {found.settings['setting']}, {chosen}.")
    outcome.notes.append(f"{len(test_labels)} test images.")
    return outcome
