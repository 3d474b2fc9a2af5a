"""Grids of runs of a recipe: the configuration of each cell, finished results, tables and heat maps."""

import copy
import csv
import hashlib
import inspect
import io
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from lightning_contrast._checks import check_at_least, fail, require
from lightning_contrast.cli.commands import did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

RECIPES = Path(__file__).parents[1] / "recipes"
SWEEPS = Path(__file__).parent / "sweeps"
RESULT = "result.json"
_KEYS = ("recipe", "grid", "set", "seeds", "metrics")
_HAVE_CLASSES = ("model", "data", "policy", "backbone", "source")
_QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
_BLUE, _YELLOW = (68, 1, 84), (253, 231, 37)


class Cell(NamedTuple):
    """One run of a sweep: the labels of its place in the grid, its seed, its configuration and its digest."""

    labels: tuple[str, ...]
    seed: int
    config: dict[str, Any]
    digest: str


class Sweep:
    """A grid of changes of a recipe, with seeds.

    Args:
        recipe: Configuration of a run, as a recipe has it.
        grid: Axes by name. The values of an axis are a list, for the argument that its name is; or a dict of changes by
            label, ``{path: value}``. A path has the parts of an argument separated by dots: ``model.temperature``,
            ``data.batch_size``, ``trainer.max_epochs``, ``trainer.callbacks.ViewAugmentation.policy.size``; entries of
            lists by number or class, and ``init_args`` may be left out. In values ``"{axis}"`` is the label of another
            axis, as YAML.
        seeds: Seeds of each cell: of weights (``seed_everything``), of the data module's order, and of every callback
            of the recipe that has one.
        changes: Changes of all runs, as in the grid.
        metrics: Names of `Trainer.callback_metrics` for the table; empty: all that end with "/top1".

    Raises:
        ValueError: If the grid or the seeds are empty, or a path does not fit the recipe.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        grid: Mapping[str, Any],
        *,
        seeds: Sequence[int] = (0,),
        changes: Mapping[str, Any] | None = None,
        metrics: Sequence[str] = (),
    ) -> None:
        hint = "Give at least one axis, such as {model.temperature: [0.1, 0.2]}"
        require(isinstance(grid, Mapping) and len(grid) > 0, "grid", "have axes", grid, hint)
        self.axes = {name: _axis(name, values) for name, values in grid.items()}
        require(len(seeds) > 0, "seeds", "hold a number", list(seeds), "Give at least one seed")
        for seed in seeds:
            check_at_least("seeds", seed, 0)
        require(len(set(seeds)) == len(seeds), "seeds", "be different", list(seeds), "Give each once")
        self.seeds, self.metrics = tuple(seeds), tuple(metrics)
        self.recipe = copy.deepcopy(recipe)
        hint = "Give the configuration of a run with `model`, `data` and `trainer`"
        require("model" in recipe and "data" in recipe, "recipe", "name a model and data", sorted(recipe), hint)
        self.recipe.setdefault("trainer", {})
        for name, value in _QUIET.items():
            self.recipe["trainer"].setdefault(name, value)
        for path, value in (changes or {}).items():
            set_argument(self.recipe, path, value)
        self.cells = list(self._cells())

    def _cells(self) -> Iterator[Cell]:
        """Yield the runs, one seed of all cells after the other; equal configurations have one digest."""
        for seed in self.seeds:
            for labels in itertools.product(*self.axes.values()):
                config = copy.deepcopy(self.recipe)
                chosen = dict(zip(self.axes, labels, strict=True))
                for name, label in chosen.items():
                    for path, value in self.axes[name][label].items():
                        set_argument(config, path, _filled(value, chosen))
                _set_seed(config, seed)
                text = json.dumps(config, sort_keys=True)
                yield Cell(labels, seed, config, hashlib.sha256(text.encode()).hexdigest()[:12])


def load_sweep(source: str, **overrides: Any) -> Sweep:
    """Return the sweep of a file, of a shipped sweep, or of a recipe with a grid.

    Args:
        source: Path of a YAML file with the keys recipe, grid, set, seeds and metrics; the name of a shipped sweep,
            such as "temperature"; or, with ``grid``, the path or name of a recipe.
        **overrides: Values of those keys, which replace the file's ("set" and "grid" are merged); None is ignored.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key is unknown, or as for `Sweep`.
    """
    spec = _read(source, {**_stems(SWEEPS), **_stems(RECIPES)})
    if "model" in spec:
        spec = {"recipe": spec}
    for key in spec:
        hint = did_you_mean(key, _KEYS).strip() or f"Known keys: {', '.join(_KEYS)}"
        require(key in _KEYS, source, f"have the keys {', '.join(_KEYS)}", key, hint.rstrip("?."))
    for key, value in overrides.items():
        if value is not None:
            spec[key] = {**spec.get(key, {}), **value} if isinstance(value, Mapping) else value
    recipe = spec.get("recipe", {})
    recipe = _read(recipe, _stems(RECIPES)) if isinstance(recipe, str) else recipe
    options = {"seeds": spec.get("seeds", (0,)), "metrics": spec.get("metrics", ())}
    return Sweep(recipe, spec.get("grid", {}), changes=spec.get("set"), **options)


def _stems(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read(source: str, known: Mapping[str, Path]) -> dict[str, Any]:
    path = Path(source) if Path(source).is_file() else known.get(source.removesuffix(".yaml"))
    if path is None:
        hint = did_you_mean(source, known).strip().rstrip("?") or "`sweep --list` shows those of the package"
        fail("sweep", "be a file, a shipped sweep or a recipe", source, hint, FileNotFoundError)
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    require(isinstance(found, dict), str(path), "hold keys and values", type(found).__name__, "Write YAML with keys")
    return dict(found)


def _axis(name: str, values: Any) -> dict[str, dict[str, Any]]:
    """Return the changes of an axis by label."""
    hint = "Give a list of values, or a dict of labels and changes"
    require(isinstance(values, list | Mapping) and len(values) > 0, f"grid.{name}", "have values", values, hint)
    if isinstance(values, Mapping):
        return {str(label): dict(changes or {}) for label, changes in values.items()}
    axis = {_label(value): {name: value} for value in values}
    require(len(axis) == len(values), f"grid.{name}", "have different values", values, "Give each once")
    return axis


def _filled(value: Any, labels: Mapping[str, str]) -> Any:
    """Return a copy of a value in which ``"{axis}"`` is replaced by the label of that axis."""
    if isinstance(value, dict):
        return {key: _filled(item, labels) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, labels) for item in value]
    is_axis = isinstance(value, str) and value[:1] + value[-1:] == "{}" and value[1:-1] in labels
    return yaml.safe_load(labels[value[1:-1]]) if is_axis else value


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def set_argument(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the argument at a path of a configuration; see `Sweep` for paths.

    Raises:
        ValueError: If a part of the path other than the last does not exist.
    """
    parts = path.split(".")
    holder: Any = {"": config}
    key: Any = ""
    for part in parts:
        node = holder[key]
        if isinstance(node, str) and key in _HAVE_CLASSES:
            node = holder[key] = {"class_path": node}
        if isinstance(node, list):
            names = [item.get("class_path", "") if isinstance(item, dict) else item for item in node]
            short = [str(name).rpartition(".")[2] for name in names]
            position = int(part) if part.isdigit() else short.index(part) if part in short else -1
            if not 0 <= position < len(node):
                fail(path, f"name one of {', '.join(short)}", part, "Give a class of the list, or its number")
            holder, key = node, position
            continue
        if not isinstance(node, dict):
            fail(path, "be the path of an argument", part, f"`{key}` is {node!r} and has no arguments")
        if "class_path" in node and part not in ("class_path", "init_args"):
            node = node.setdefault("init_args", {})
        if part not in node and (part is not parts[-1] or len(parts) == 1):
            hint = did_you_mean(part, map(str, node)).strip().rstrip("?") or f"There are {', '.join(map(str, node))}"
            fail(path, "be the path of an argument", part, hint)
        holder, key = node, part
    holder[key] = value


def _set_seed(config: dict[str, Any], seed: int) -> None:
    """Give weights, order of the data and callbacks of a configuration a seed."""
    from lightning_contrast import data

    config["seed_everything"] = seed
    for callback in config["trainer"].get("callbacks") or ():
        if isinstance(callback, dict) and "seed" in callback.get("init_args", {}):
            callback["init_args"]["seed"] = seed
    place = config
    for key in ("data", "source"):  # wrappers have a data module as their source
        if key not in place:
            break
        if isinstance(place[key], str):
            place[key] = {"class_path": place[key]}
        module = getattr(data, str(place[key]["class_path"]).rpartition(".")[2], None)
        place, has_seed = place[key].setdefault("init_args", {}), "seed" in place[key].get("init_args", {})
        if has_seed or (module is not None and "seed" in inspect.signature(module).parameters):
            place["seed"] = seed


def results(sweep: Sweep, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results in a folder by digest: of all cells of the sweep that finished or failed."""
    paths = {cell.digest: folder / "runs" / cell.digest / RESULT for cell in sweep.cells}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def table(sweep: Sweep, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per cell of the grid: labels, and per metric the values of the seeds that finished.

    Args:
        sweep: The sweep.
        found: Its `results`.

    Returns:
        Dicts of the axes' labels, ``"values"`` (metric to list, in the order of the seeds), ``"finished"`` and
        ``"failed"``, numbers of runs.
    """
    finished = {name: result["metrics"] for name, result in found.items() if result["status"] == "finished"}
    names = sweep.metrics or sorted({name for one in finished.values() for name in one if name.endswith("/top1")})
    rows = []
    for labels in itertools.product(*sweep.axes.values()):
        own = [cell.digest for cell in sweep.cells if cell.labels == labels]
        done = [finished[name] for name in own if name in finished]
        values = {name: [one[name] for one in done if name in one] for name in names}
        failed = sum(found[name]["status"] == "failed" for name in own if name in found)
        rows.append({"labels": labels, "values": values, "finished": len(done), "failed": failed})
    return rows


def as_markdown(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown: mean and sample standard deviation over the seeds."""
    names = list(rows[0]["values"])
    lines = [
        "| " + " | ".join([*sweep.axes, *names, "seeds"]) + " |",
        "|---" * (len(sweep.axes) + len(names) + 1) + "|",
    ]
    for row in rows:
        failed = f", {row['failed']} failed" if row["failed"] else ""
        cells = [*row["labels"], *map(_mean_and_spread, row["values"].values()), f"{row['finished']}{failed}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def as_csv(sweep: Sweep, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all runs as CSV, one row each: labels, seed, digest, status, seconds and every metric."""
    names = sorted({name for one in found.values() for name in one.get("metrics", {})})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*sweep.axes, "seed", "run", "status", "seconds", *names])
    for cell in sweep.cells:
        one = found.get(cell.digest, {"status": "not run"})
        metrics = [one.get("metrics", {}).get(name, "") for name in names]
        writer.writerow([*cell.labels, cell.seed, cell.digest, one["status"], one.get("seconds", ""), *metrics])
    return file.getvalue()


def heat_map(sweep: Sweep, rows: Sequence[Mapping[str, Any]], metric: str) -> "Image":
    """Draw the means of a metric: the last axis from left to right, all others from top to bottom.

    Args:
        sweep: The sweep.
        rows: Of `table`.
        metric: One of its metrics. Colors go from the smallest mean to the largest; cells without a run are white.

    Returns:
        An RGB picture.
    """
    from PIL import Image, ImageDraw

    columns = list(list(sweep.axes.values())[-1])
    means = [statistics.fmean(row["values"][metric]) if row["values"][metric] else None for row in rows]
    known = [mean for mean in means if mean is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    names = [" / ".join(row["labels"][:-1]) for row in rows[:: len(columns)]]
    width, height = max(64, 7 * max(map(len, columns)) + 12), 36
    left, top = 7 * max(map(len, names)) + 16, 40
    picture = Image.new("RGB", (left + width * len(columns) + 8, top + height * len(names) + 8), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((4, 4), f"{metric}, mean of the seeds; columns: {list(sweep.axes)[-1]}", fill="black")
    for column, label in enumerate(columns):
        draw.text((left + column * width + 4, 24), label, fill="black")
    for number, mean in enumerate(means):
        row, column = divmod(number, len(columns))
        x, y = left + column * width, top + row * height
        if column == 0:
            draw.text((4, y + 11), names[row], fill="black")
        share = 0.5 if mean is None or high == low else (mean - low) / (high - low)
        color = tuple(round(a + share * (b - a)) for a, b in zip(_BLUE, _YELLOW, strict=True))
        draw.rectangle((x, y, x + width - 3, y + height - 3), fill="white" if mean is None else color, outline="gray")
        words = "-" if mean is None else f"{mean:.3f}"
        draw.text((x + 6, y + 11), words, fill="black" if share > 0.4 or mean is None else "white")
    return picture
