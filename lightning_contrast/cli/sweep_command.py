"""The command ``lightning-contrast sweep``: run a recipe over a grid of arguments and seeds; table and heat maps."""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_contrast.cli.commands import LightParser
from lightning_contrast.runtime.quiet import quiet_lightning

_LONGEST = 12  # runs that `--dry-run` lists


def run_sweep(args: Sequence[str]) -> list[dict[str, Any]]:
    """Run the cells that have no result yet, and write the tables and heat maps.

    Each run has a folder ``runs/DIGEST`` below the output, named by its configuration, with what `fit` leaves there
    and ``result.json``: `Trainer.callback_metrics` at the end. A second call continues: finished runs are kept, failed
    ones are repeated, and an interrupted one continues from its last checkpoint.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The rows of the table.

    Raises:
        SystemExit: With status 1, if runs failed; with status 2, if arguments cannot be parsed.
        ValueError: If the sweep does not fit its recipe.
    """
    parser = _parser()
    given = parser.parse_args(args)
    from lightning_contrast.cli.sweep import SWEEPS, load_sweep, results

    if given.list:
        for path in sorted(SWEEPS.glob("*.yaml")):
            sys.stdout.write(f"{path.stem}: {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}\n")
        return []
    if given.sweep is None:
        parser.error("A file, a shipped sweep (`--list`) or a recipe is needed.")
    grid = dict(map(_assignment, given.grid))
    changes = dict(map(_assignment, given.set))
    sweep = load_sweep(
        given.sweep, grid=grid or None, set=changes or None, seeds=given.seeds, metrics=given.metrics or None
    )
    folder = Path(given.output)
    done = {name for name, one in results(sweep, folder).items() if one["status"] == "finished"}
    first = {cell.digest: cell for cell in reversed(sweep.cells)}  # equal cells are one run
    todo = [cell for cell in sweep.cells if cell is first[cell.digest] and cell.digest not in done]
    sys.stdout.write(f"{len(sweep.cells)} cells with seeds, {len(done)} runs finished, {len(todo)} to run\n")
    if given.dry_run:
        for cell in todo[:_LONGEST]:
            sys.stdout.write(f"{cell.digest}: {', '.join(cell.labels)}, seed {cell.seed}\n")
        return []
    try:
        for number, cell in enumerate(todo if not given.table else (), 1):
            sys.stdout.write(f"run {number} of {len(todo)}: {', '.join(cell.labels)}, seed {cell.seed}\n")
            sys.stdout.flush()
            with quiet_lightning(), warnings.catch_warnings():
                # Of Lightning 2.6 with torch >= 2.13, in every run.
                warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
                result = _run(cell.config, folder / "runs" / cell.digest)
            why = f": {result['error']}" if "error" in result else ""
            sys.stdout.write(f"  {result['status']} after {result['seconds']} s{why}\n")
    finally:
        rows = _write(sweep, folder)
    failed: dict[str, list[str]] = {}
    for name, one in results(sweep, folder).items():
        if one["status"] == "failed":
            failed.setdefault(one["error"], []).append(name)
    for error, names in failed.items():
        which = f"run {names[0]}" if len(names) == 1 else f"{len(names)} runs, the first of which is {names[0]},"
        sys.stderr.write(f"error: {which} failed: {error}\n")
    if failed:
        sys.exit(1)
    return rows


def _parser() -> LightParser:
    parser = LightParser(
        "sweep",
        description="Run a recipe over a grid of arguments and seeds; write table.md, results.csv and heat maps. A "
        "second call continues.",
    )
    parser.add_argument("sweep", nargs="?", help="YAML file, shipped sweep (--list), or recipe with --grid")
    parser.add_argument("--output", default="sweep", help="folder; default: sweep")
    parser.add_argument("--grid", action="append", default=[], metavar="PATH=[A,B]", help="axis: argument and values")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of each cell; default: of the file, or 0")
    parser.add_argument("--metrics", nargs="+", default=[], help="of the table; default: all that end with /top1")
    parser.add_argument("--table", action="store_true", help="only write the table of what is finished")
    parser.add_argument("--dry-run", action="store_true", help="only show what would run")
    parser.add_argument("--list", action="store_true", help="show the sweeps of the package")
    return parser


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    from lightning_contrast._checks import require

    key, has_value, value = text.partition("=")
    require(bool(has_value), "PATH=VALUE", "have a path and a value", text, "Write model.temperature=[0.1,0.2]")
    return key, yaml.safe_load(value)


def _run(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run one configuration in its folder, write its result and return it; errors of the run are part of it."""
    import yaml

    from lightning_contrast.checkpoints import latest_checkpoint
    from lightning_contrast.cli._command_line import build
    from lightning_contrast.cli._errors import user_message
    from lightning_contrast.cli.sweep import RESULT

    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config), encoding="utf-8")
    arguments = ["fit", "--config", str(recipe), f"--trainer.default_root_dir={folder}"]
    # A run with a result is here because it failed: it starts again, not from just before its end.
    checkpoint = None if (folder / RESULT).is_file() else latest_checkpoint(folder)
    arguments += [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
    start, before, result = time.monotonic(), sys.argv, {"status": "finished", "seed": config["seed_everything"]}
    try:
        sys.argv = before[:1]  # LightningCLI warns of arguments in both places
        trainer = build(arguments, run=True).trainer
        result["metrics"] = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        result["epochs"], result["steps"] = trainer.current_epoch, trainer.global_step
    except Exception as error:
        message = user_message(error)
        if message is None or "--debug" in before:
            raise
        result |= {"status": "failed", "error": message}
    finally:
        sys.argv = before
    result["seconds"] = round(time.monotonic() - start, 1)
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _write(sweep: Any, folder: Path) -> list[dict[str, Any]]:
    """Write tables and heat maps of what is finished and print the table."""
    from lightning_contrast.cli.sweep import as_csv, as_markdown, heat_map, results, table

    found = results(sweep, folder)
    rows = table(sweep, found)
    folder.mkdir(parents=True, exist_ok=True)
    text = as_markdown(sweep, rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "results.csv").write_text(as_csv(sweep, found), encoding="utf-8")
    for metric in rows[0]["values"]:
        heat_map(sweep, rows, metric).save(folder / f"heat_{metric.replace('/', '_')}.png")
    sys.stdout.write(text)
    return rows
