"""The report: one feature pass for each model, then every part from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_contrast._checks import check_at_least, check_choice, fail, require
from lightning_contrast.augment.images import as_float
from lightning_contrast.callbacks.throughput.meters import check_codecarbon
from lightning_contrast.checkpoints import load_checkpoint
from lightning_contrast.distributed import rank
from lightning_contrast.evaluation.feature_pass.cache import FeatureSet, cached_features, write_file
from lightning_contrast.evaluation.feature_pass.fingerprint import digest, tensor_digest
from lightning_contrast.evaluation.feature_pass.subjects import Preprocess, Subject, load_subject
from lightning_contrast.evaluation.report_card.context import Context, about_data, find_loaders, writable
from lightning_contrast.evaluation.report_card.drawing import part_inputs
from lightning_contrast.evaluation.report_card.parts import PARTS
from lightning_contrast.evaluation.report_card.result import Outcome, Report, packed, unpacked
from lightning_contrast.seeding import derived_seed, isolated

OPTIONS: dict[str, Any] = {
    "corrupted_images": 256,
    "held_out_corruptions": False,
    "severities": (1, 2, 3, 4, 5),
    "grid_steps": 1250,
    "sweep_steps": 3,
    "max_iter": 300,
    "view_images": 128,
    "views": 8,
    "scenes": 256,
    "segmentation_steps": 500,
    "detection_steps": 200,
    "energy": False,
    "pictures": 300,
    "recipe": "small",
    "tuned_test_images": 2048,
    "imbalance": 100,
    "attacked_images": 128,
    "attack_steps": 20,
    "shortcut_train_images": 1024,
    "shortcut_test_images": 256,
    "cue_images": 512,
    "maps": ("t-SNE",),
}
"""Options of the parts: test images that are corrupted, whether by the four further corruptions of ImageNet-C as well,
severities, steps of SGD of the grid of heads (12,500 in the
paper), halvings of the search for C (8 in CLIP's), iterations of each fit of it (1,000 in CLIP's), images and views of
the geometry, scenes that the dense parts learn from (they are judged by half as many) and steps of their heads, whether
`cost` measures energy for five seconds per model (extra ``energy``), images of the figures, recipe of the fine-tuning
(a name of `FINE_TUNE_RECIPES`) and its test images at most, imbalance of the long tail, test images that are attacked
and steps of an attack, images of the planted shortcut, images with conflicting cues, and maps: "t-SNE" and "UMAP"
(extra ``umap``)."""
_OF_FIGURES = ("pictures", "maps")
_PROBED = 4  # images whose features, as floats, tell preprocessings apart
_VERSION = 1  # of the files of single parts


def report(
    models: Mapping[str, str | Path | nn.Module | Subject],
    datamodule: Any,
    *,
    output: str | Path,
    parts: Sequence[str] | Literal["all"] | None = None,
    reference: str | None = None,
    seed: int = 0,
    preprocess: Mapping[str, Preprocess] | None = None,
    options: Mapping[str, Any] | None = None,
    transfer: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Judge models by many protocols on one DataModule, and write a page, Markdown and JSON.

    Each model runs once over the training and the test images (`cached_features`); most parts need nothing else. What
    fails is named in the report, and does not stop the rest. Finished parts are kept in ``output``, so that a run that
    was killed continues where it stopped. Two runs with one seed give the same ``report.json``, byte for byte; with a
    process group, the ranks share the feature pass, and rank 0 writes.

    Args:
        models: Modules, paths of checkpoints or names of timm, by the name they have in the report; see `load_subject`.
        datamodule: A LightningDataModule with labels, whose training images are learned from and whose test images (or
            validation images, if it has none) are judged by.
        output: Folder of ``report.html``, ``report.md``, ``report.json`` and ``measured.json`` (times).
        parts: Names of `PARTS`, or "all"; None is those that are default.
        reference: Name of the model that the others are compared with; None is the first.
        seed: Seed of all draws, >= 0.
        preprocess: By model, a function from the images of the loader to the input, where that of `load_subject` is not
            meant.
        options: Some of `OPTIONS`.
        transfer: Other DataModules by name, for the part "transfer", which is default with them.
        cache: Folder of the features; None is ``output/features``.
        progress: Show progress bars, in a terminal.

    Returns:
        The report, which has been written.

    Raises:
        ValueError: If a name is unknown, or no model could be evaluated.
        TypeError: If ``datamodule`` is not a DataModule, or ``transfer`` not a dict.
        OSError: If ``output`` cannot be written.

    Example:
        >>> found = report({"mine": "simclr.ckpt"}, data, output="card")  # doctest: +SKIP
        >>> found.table()[0]  # doctest: +SKIP
    """
    names, chosen = _checked(models, parts, reference, seed)
    if parts is None and transfer:
        chosen = [name for name in PARTS if name in (*chosen, "transfer")]
    others = transfer or {}
    if not isinstance(others, Mapping):
        fail("transfer", "be a dict from names to DataModules", type(others).__name__, 'Give {"name": data}', TypeError)
    used = dict(OPTIONS) | _known_options(options or {})
    folder = writable(output)
    found = Report({}, {}, {}, {}, {}, names[0], seed)
    train_loader, test_loader = find_loaders(datamodule)
    where = Path(cache) if cache is not None else folder / "features"
    context = Context({}, {}, {}, test_loader, _class_names(datamodule), seed, used)
    context.datamodule, context.train_loader, context.transfer, context.folder = datamodule, train_loader, others, where
    for name in names:
        try:
            subject = load_subject(models[name], (preprocess or {}).get(name))
            sets = [
                cached_features(subject, loader, folder=where, progress=progress)
                for loader in (train_loader, test_loader)
            ]
        except Exception as error:  # noqa: BLE001  # a network may raise any
            found.errors.setdefault("features", {})[name] = _one_line(error)
            continue
        context.subjects[name], context.train[name], context.test[name] = subject, *sets
        found.models[name] = {"source": subject.source, "features": sets[1].features.shape[1]}
        found.models[name] |= {"input": subject.input_spec}
    if not context.subjects:
        first, message = next(iter(found.errors["features"].items()))
        fail("models", "include one that can be evaluated", first, message.rstrip("."))
    found.reference = names[0] if names[0] in context.subjects else next(iter(context.subjects))
    first = next(iter(context.subjects))
    found.data = about_data(datamodule, {"train": context.train[first], "test": context.test[first]})
    if "features" in found.errors:
        found.parts["features"] = {
            **{"title": "Features", "meaning": "Models that gave no features.", "protocol": "", "source": ""},
            **{"headline": "", "higher_is_better": None},
        }
        found.outcomes["features"] = {}
    _run_parts(found, context, chosen, folder, progress=progress)
    if rank() == 0:
        from lightning_contrast.evaluation.report_card.figures import draw

        found.figures = draw(found, context)
        found.save(folder)
    return found


def _run_parts(found: Report, context: Context, chosen: Sequence[str], folder: Path, *, progress: bool) -> None:
    """Run the parts one by one, and keep each on disk."""
    from tqdm import tqdm

    keys = {name: _model_key(context, name) for name in context.subjects}
    measured = {name: value for name, value in context.options.items() if name not in _OF_FIGURES}
    quiet = None if progress and rank() == 0 else True  # None: only in a terminal
    places = {name: place for place, name in enumerate(PARTS)}  # the seed of a part does not depend on the others
    with tqdm(total=len(chosen) * len(keys), desc="parts", disable=quiet, leave=False) as bar:
        for name in chosen:
            part = PARTS[name]
            about = {"title": part.title, "meaning": part.meaning, "protocol": part.protocol, "source": part.source}
            found.parts[name] = about | {"headline": part.headline, "higher_is_better": part.higher_is_better}
            found.outcomes[name] = context.outcomes[name] = {}
            for model in context.subjects:
                bar.set_postfix_str(f"{name}, {model}")
                others = sorted(keys.values()) if name in ("similarity", "corruptions") else part_inputs(context, name)
                key = digest(_VERSION, name, keys[model], others, model, found.reference, context.seed, measured)
                path = folder / "parts" / f"{name}-{key}.pt"
                outcome = _saved(path)
                if outcome is None:
                    try:
                        with isolated(derived_seed(context.seed, places[name])):
                            outcome = part.run(context, model)
                    except Exception as error:  # noqa: BLE001  # a network may raise any
                        found.errors.setdefault(name, {})[model] = _one_line(error)
                    else:
                        if rank() == 0:
                            write_file(packed(outcome), path)
                if outcome is not None:
                    found.outcomes[name][model] = outcome
                bar.update()


def _saved(path: Path) -> Outcome | None:
    """Return the outcome in a file, or None if there is no intact one."""
    if not path.exists():
        return None
    try:
        return unpacked(load_checkpoint(path))
    except (ValueError, RuntimeError, OSError, KeyError):
        return None


def _model_key(context: Context, name: str) -> str:
    """Return a digest of a model, its features and their labels.

    Parts that change images give the preprocessing floats in 0..1, and fine-tuning trains what requires gradients: two
    models with the same features of the loader's images may differ in both.
    """
    sets: list[FeatureSet] = [context.train[name], context.test[name]]
    tensors: list[Tensor] = []
    for of in sets:
        tensors += [of.features, *of.columns.values()] + ([] if of.labels is None else [of.labels])
    subject = context.subjects[name]
    trained = [parameter for parameter, of in subject.module.named_parameters() if of.requires_grad]
    try:
        with isolated(derived_seed(context.seed)):  # random transforms
            images, _ = context.images(_PROBED)
            floats = tensor_digest(context.encode(name, as_float(images)).half())
    except Exception as error:  # noqa: BLE001  # images of another range; the parts that need one name it
        floats = type(error).__name__
    model = [repr(subject.module), subject.input_spec, trained, floats]
    return digest(*(tensor_digest(tensor) for tensor in tensors), sorted(sets[1].columns), model)


def _checked(
    models: Mapping[str, Any], parts: Sequence[str] | Literal["all"] | None, reference: str | None, seed: int
) -> tuple[list[str], list[str]]:
    """Return the names of the models, the reference first, and of the parts in their order."""
    hint = 'Give {"mine": model}'
    if not isinstance(models, Mapping):
        fail("models", "be a dict from names to models", type(models).__name__, hint, TypeError)
    require(len(models) > 0, "models", "hold at least one model", {}, hint)
    check_at_least("seed", seed, 0)
    names = list(models)
    if reference is not None:
        check_choice("reference", reference, names)
        names = [reference, *(name for name in names if name != reference)]
    if parts == "all" or list(parts or ()) == ["all"]:
        return names, list(PARTS)
    if isinstance(parts, str):
        fail("parts", 'be a list of names or "all"', parts, f"Give [{parts!r}]", TypeError)
    for part in parts or ():
        check_choice("parts", part, PARTS)
    wanted = set(parts) if parts is not None else {name for name, part in PARTS.items() if part.by_default}
    return names, [name for name in PARTS if name in wanted]


def _known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        check_choice("options", name, OPTIONS)
    if options.get("energy"):
        check_codecarbon()
    for layout in options.get("maps", ()):
        check_choice("maps", layout, ("t-SNE", "UMAP"))
    return dict(options)


def _class_names(datamodule: Any) -> list[str] | None:
    found = getattr(datamodule, "class_names", None)
    return [str(name) for name in found] if isinstance(found, list | tuple) else None


def _one_line(error: Exception) -> str:
    text = " ".join((str(error) or type(error).__name__).split())
    return text if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {text}"
