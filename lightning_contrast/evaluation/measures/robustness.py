"""The mean corruption error of ImageNet-C."""

from collections.abc import Mapping, Sequence

from lightning_contrast._checks import check_interval, fail, require

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Errors of AlexNet on ImageNet-C, means over the five severities."""
ALEXNET_CLEAN_ERROR = 0.4345
"""Error of AlexNet on ImageNet, from the paper."""


def mean_corruption_error(
    accuracies: Mapping[str, Sequence[float]],
    *,
    baseline_errors: Mapping[str, float],
    clean_error: float | None = None,
    baseline_clean_error: float | None = None,
) -> dict[str, float | dict[str, float] | None]:
    """Compute the mean corruption error (mCE) relative to a reference model.

    Source: https://arxiv.org/abs/1903.12261, section 4.2: per corruption the error, averaged over the severities, is
    divided by that of the reference (AlexNet in the paper, `ALEXNET_ERRORS`); mCE is the mean over the corruptions.
    The relative mCE subtracts the clean errors from both first.

    Args:
        accuracies: By corruption, the accuracies of the severities, in 0..1.
        baseline_errors: By corruption, the mean error of the reference over the severities, in (0, 1].
        clean_error: Error of the model on clean images; with the next one, for the relative mCE.
        baseline_clean_error: Error of the reference on clean images.

    Returns:
        ``mce``, in percent: 100 is as good as the reference; ``corruption_error``, in percent by corruption; and
        ``relative_mce``, in percent, None without the clean errors.

    Raises:
        ValueError: If there are no corruptions, one has no reference, or a number is out of range.
    """
    require(len(accuracies) > 0, "accuracies", "hold at least one corruption", {}, "Give accuracies by corruption")
    together = (clean_error is None) == (baseline_clean_error is None)
    hint = "Both clean errors give the relative mCE"
    require(together, "baseline_clean_error", "be given with `clean_error`", baseline_clean_error, hint)
    missing = sorted(accuracies.keys() - baseline_errors.keys())
    require(not missing, "baseline_errors", f"hold {missing}", sorted(baseline_errors), "Give a reference for each")
    errors, ratios = {}, {}
    for name, found in accuracies.items():
        values = [float(value) for value in found]
        if not values or not all(0 <= value <= 1 for value in values):
            fail(f"accuracies[{name!r}]", "be accuracies in 0..1", values, "Give one per severity")
        reference = float(baseline_errors[name])
        check_interval(f"baseline_errors[{name!r}]", reference, "(0, 1]", "Give a share")
        errors[name] = 1 - sum(values) / len(values)
        ratios[name] = 100 * errors[name] / reference
    relative = None
    if clean_error is not None and baseline_clean_error is not None:
        gaps = [
            (error - clean_error) / (baseline_errors[name] - baseline_clean_error) for name, error in errors.items()
        ]
        relative = 100 * sum(gaps) / len(gaps)
    return {"mce": sum(ratios.values()) / len(ratios), "corruption_error": ratios, "relative_mce": relative}
