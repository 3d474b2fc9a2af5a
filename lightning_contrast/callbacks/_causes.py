"""The likely causes of a collapse, from what a module tells of itself."""

from lightning_contrast.callbacks._facts import Facts


def cause_of_collapse(facts: Facts) -> tuple[str, str]:
    """Return the likely cause of a complete collapse, and what to try."""
    if facts.variance_weight == 0:
        return "no variance term", (
            "`variance_weight` is 0, so nothing keeps the projections of different images apart; VICReg takes 25"
        )
    if facts.negatives:
        return "", "Check that negatives are other images' embeddings, and lower the learning rate"
    return _cause_with_teacher(facts) if facts.teacher else _cause_without_teacher(facts)


def _cause_with_teacher(facts: Facts) -> tuple[str, str]:
    if facts.predictor == "there":
        return "", "Raise the teacher's momentum, keep BatchNorm in the heads, check that targets have no gradient"
    what = "is nn.Identity" if facts.predictor == "identity" else "is missing"
    return "no predictor", f"There is a momentum network without negatives, and the predictor {what}: add one"


def _cause_without_teacher(facts: Facts) -> tuple[str, str]:
    if facts.predictor != "there":
        return "", "Add what keeps images apart: negatives, a variance term, or a predictor with a stopped gradient"
    if facts.predictor_lr == 0:
        return "predictor does not learn", "The predictor's learning rate is 0: give its parameters to the optimizer"
    return "no stop-gradient", (
        "There is a predictor and no momentum network: detach the target, `loss(predictor(z_a), z_b.detach())`; if it "
        f"is detached, keep the predictor's learning rate ({facts.predictor_lr or 0:g}) high while the others fall"
    )


def cause_of_prototypes(facts: Facts) -> tuple[str, str]:
    """Return the likely cause of a prototype collapse, and what to try."""
    if facts.center in ("zero", "missing"):
        what = "has stayed at zero" if facts.center == "zero" else "is missing"
        return "no centring", f"The centre of the teacher's logits {what}: centre them (DINO: `center_momentum` 0.9)"
    return "", "Centre the teacher's logits or balance the assignments (Sinkhorn), or raise the teacher's temperature"


def cause_of_dimensional(facts: Facts, highest: float) -> tuple[str, str]:
    """Return the likely cause of a dimensional collapse, and what to try; above ``highest`` it is the temperature."""
    if facts.temperature is not None and facts.temperature > highest:
        return "temperature too high", (
            f"With a temperature of {facts.temperature:g} logits lie within +-{1 / facts.temperature:.2g}, all "
            "negatives repel alike and one direction is enough; contrastive losses take 0.05 to 0.5"
        )
    if facts.variance_weight == 0 or not (facts.negatives or facts.teacher or facts.variance_weight):
        cause, advice = cause_of_collapse(facts)
        if cause:
            return cause, advice
    return "", (
        "Raise the weight of the term that decorrelates dimensions, weaken the strongest augmentation, widen the head, "
        "or lower the learning rate"
    )
