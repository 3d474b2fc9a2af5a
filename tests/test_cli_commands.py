"""The commands of the command line: overview, methods, views, sweep, the run folder and errors of the user."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import lightning_contrast as lc
from lightning_contrast.cli import commands, entry_point, main
from lightning_contrast.cli.method_cards import method_cards
from lightning_contrast.cli.sweep import SWEEPS, Sweep, load_sweep, results, set_argument, table
from lightning_contrast.evaluation import propose, view_effects
from lightning_contrast.evaluation.view_effects import ViewEffect
from tests.tolerances import assert_same_bits

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The dirpath has changed",
    "ignore:Checkpoint directory .* exists and is not empty",
)

ROOT = Path(__file__).parents[1]
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
CPU += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = ["--seed_everything=0", "--model=SimCLR", "--model.backbone=small_convnet", "--model.warmup_epochs=0"]
SMALL += ["--data=EmojiDataModule", "--data.batch_size=32", "--trainer.limit_train_batches=3"]
SMALL += ["--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1", *CPU]
VIEWS = ["--trainer.callbacks=ViewAugmentation", "--trainer.callbacks.policy=simclr_cifar_views"]
VIEWS += ["--trainer.callbacks.policy.size=32", "--trainer.callbacks+=StepSeed", "--trainer.callbacks.seed=0"]


def call(arguments, monkeypatch, capsys):
    """Run the console script; return its exit status, and what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", *arguments])
    capsys.readouterr()
    try:
        entry_point()
    except SystemExit as ended:
        code = ended.code
    else:
        code = 0
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.dist  # starts a process
def test_help_and_typos_import_neither_torch_nor_lightning():
    program = "import sys; from lightning_contrast.cli import entry_point\n"
    program += "sys.argv = ['lightning-contrast', *sys.argv[1:]]\ntry:\n    entry_point()\nexcept SystemExit as e:\n"
    program += "    print('code', e.code, 'heavy', sorted({'torch', 'lightning', 'jsonargparse'} & set(sys.modules)))"
    for arguments, code in ((["--help"], 0), (["sweeep"], 2), (["--version"], 0), (["methods"], None)):
        ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        if code is not None:
            assert f"code {code} heavy []" in ran.stdout
    assert "SimCLR" in ran.stdout


def test_the_overview_lists_every_command_with_its_line(monkeypatch, capsys):
    code, out, _ = call(["--help"], monkeypatch, capsys)
    files = {path.stem.removesuffix("_command") for path in Path(commands.__file__).parent.glob("*_command.py")}
    assert code == 0
    assert set(commands.summaries()) == {"fit", "validate", "test", "predict"} | files
    assert {"methods", "views", "sweep", "report"} <= files
    for name, line in commands.summaries().items():
        assert len(line) > 15, name
        assert f"  {name} " in out
        assert line in out
    assert call([], monkeypatch, capsys)[0] == 2


def test_methods_lists_all_and_shows_one(monkeypatch, capsys):
    code, out, _ = call(["methods", "--format", "csv"], monkeypatch, capsys)
    rows = list(csv.DictReader(out.splitlines()))
    named = {name for name in lc.methods.__all__ if name != "SelfSupervisedModule"}
    assert code == 0
    assert {row["method"] for row in rows} == named
    assert all(len(row["idea"]) > 20 for row in rows)
    assert next(row for row in rows if row["method"] == "BYOL")["papers"] == "https://arxiv.org/abs/2006.07733"
    recipes = {recipe for row in rows for recipe in row["recipes"].split()}
    assert recipes == {path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml")}
    assert "temperature = 0.1: Divisor" in call(["methods", "simclr"], monkeypatch, capsys)[1]
    assert call(["methods", "SimCRL"], monkeypatch, capsys)[::2] == (
        2,
        "error: `SimCRL` is no method. Did you mean SimCLR? `methods` lists them. (--debug shows the traceback)\n",
    )


def test_defaults_of_the_cards_are_those_of_the_constructors():
    import inspect

    for name, card in method_cards().items():
        parameters = inspect.signature(getattr(lc, name)).parameters
        for argument in card.arguments:
            default = parameters[argument.name].default
            expected = "" if default is inspect.Parameter.empty else default
            shown = argument.default
            assert shown == "" if expected == "" and shown == "" else shown, (name, argument)
            if isinstance(default, int | float | str | bool) and not isinstance(default, type):
                assert eval(shown, vars(sys.modules[getattr(lc, name).__module__])) == default, (name, argument)


@pytest.fixture
def folder(tmp_path):
    """Write twelve images of two classes: red and blue squares of different shades with a dot of their own."""
    for kind, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(6):
            pixels = torch.zeros(32, 32, 3, dtype=torch.uint8)
            pixels[..., channel] = 180 + 10 * number
            row, column = divmod(number, 3)
            pixels[4 + 12 * row : 12 + 12 * row, 2 + 10 * column : 9 + 10 * column] = 255
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / kind / f"{number}.png")
    return tmp_path / "images"


def test_views_writes_a_picture_and_judges(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out" / "v.png"
    arguments = [
        "views",
        str(folder),
        "--policy",
        "byol_views",
        "--size",
        "32",
        "--samples",
        "4",
        "--output",
        str(output),
    ]
    code, out, _ = call(arguments, monkeypatch, capsys)
    first = output.read_bytes()
    assert code == 0
    assert "4 of 12 images" in out
    with Image.open(output) as picture:
        assert picture.size[1] > 4 * 128
    assert call([*arguments, "--seed", "1"], monkeypatch, capsys)[0] == 0
    assert output.read_bytes() != first
    assert call(arguments, monkeypatch, capsys)[0] == 0
    assert output.read_bytes() == first  # a seed gives one picture
    judged = [*arguments, "--judge", "--operations", "hue", "flip", "blur"]
    code, out, _ = call(judged, monkeypatch, capsys)
    rows = list(csv.DictReader(output.with_suffix(".csv").read_text().splitlines()))
    assert code == 0
    assert [row["operation"] for row in rows].count("hue") == 4
    assert [row["operation"] for row in rows].count("views") == 4
    assert "| hue | 0 .. " in out
    assert output.with_suffix(".md").read_text() in out


class Color(torch.nn.Module):
    """Features that are the mean color of an image."""

    def forward(self, images):
        return images.mean(dim=(2, 3)) - 0.3


def test_effects_are_those_of_the_features():
    """Of mean colors: a flip loses nothing; gray loses the class; equal features give 1 / N."""
    torch.manual_seed(0)
    labels = torch.arange(20) % 2
    images = torch.full((20, 3, 16, 16), 0.1)
    images[:, 0] += 0.6 * (1 - labels).view(-1, 1, 1) + 0.01 * torch.arange(20).view(-1, 1, 1)
    images[:, 2] += 0.6 * labels.view(-1, 1, 1) + 0.013 * torch.arange(20).view(-1, 1, 1)
    to_gray = {"gray": (lambda x, s: torch.lerp(x, x.mean(dim=1, keepdim=True).expand_as(x), s), [0.0, 1.0])}
    to_black = {"black": (lambda x, s: x * (1 - s) + s * 0.0, [1.0])}
    none, gray = view_effects(Color(), images, labels, changes=to_gray, k=3)
    assert (none.identity, none.class_lost, none.accuracy) == (1.0, 0.0, 1.0)
    assert gray.class_lost == pytest.approx(1.0 - gray.accuracy)
    assert gray.class_lost > 0.3
    assert gray.identity < 0.5
    (flip,) = view_effects(Color(), images, labels, changes=["flip"], k=3)
    assert (flip.identity, flip.class_lost) == (1.0, 0.0)
    (black,) = view_effects(Color(), images, labels, changes=to_black, k=3)
    assert black.identity == pytest.approx(1 / 20)  # one of the originals is nearest to all of them
    constant = torch.nn.Sequential(Color(), torch.nn.Linear(3, 2))
    torch.nn.init.zeros_(constant[1].weight)
    (equal,) = view_effects(constant, images, changes=["flip"])
    assert equal.identity == pytest.approx(1 / 20)
    assert equal.class_lost is None


def effect(strength, identity, lost):
    return ViewEffect("hue", strength, "", identity, 0.0, None if lost is None else 0.5, lost, 0.0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([effect(0.1, 1.0, 0.01), effect(0.2, 0.4, 0.04), effect(0.5, 0.1, 0.3)], (0.2, False)),
        ([effect(0.1, 1.0, 0.2), effect(0.2, 0.4, 0.0)], (None, False)),  # a stronger one that passes is chance
        ([effect(0.1, 1.0, -0.1), effect(0.2, 0.4, 0.05)], (0.2, True)),
        ([effect(0.1, 0.8, None), effect(0.2, 0.4, None)], (0.1, False)),
    ],
)
def test_ranges_end_before_the_first_strength_over_the_limit(rows, expected):
    assert propose(rows)["hue"] == expected
    assert propose(rows[::-1])["hue"] == expected


def test_judged_policies_do_not_normalize():
    images = torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"`policy` must give images in 0\.\.1"):
        view_effects(None, images, policy=lc.augment.simclr_views(8, mean=[0.5] * 3, std=[0.5] * 3))
    policy = lc.augment.simclr_views(8)
    policy.set_strength(0.7)
    state = torch.get_rng_state()
    assert len(view_effects(None, images, changes=["flip"], policy=policy)) == 5
    assert policy.strength == 0.7
    assert torch.equal(torch.get_rng_state(), state)


RECIPE = {
    "model": {"class_path": "SimCLR", "init_args": {"backbone": "small_convnet", "warmup_epochs": 0}},
    "data": "EmojiDataModule",
    "trainer": {"callbacks": [{"class_path": "StepSeed", "init_args": {"seed": 0}}]},
}


def test_cells_are_the_product_of_axes_and_seeds():
    grid = {"model.temperature": [0.1, 0.2], "width": {"8": {}, "16": {}}}
    grid["head"] = {"own": {"model.projection_dim": "{width}"}, "none": {"model.projector": "torch.nn.Identity"}}
    sweep = Sweep(RECIPE, grid, seeds=(3, 4), changes={"data.batch_size": 64, "trainer.max_epochs": 2})
    assert len(sweep.cells) == 2 * 2 * 2 * 2
    assert len({cell.digest for cell in sweep.cells}) == 2 * (2 + 1) * 2  # without a head there is no width
    cell = next(cell for cell in sweep.cells if cell.labels == ("0.2", "16", "own") and cell.seed == 4)
    assert cell.config["model"]["init_args"] == {
        "backbone": "small_convnet",
        "warmup_epochs": 0,
        "temperature": 0.2,
        "projection_dim": 16,
    }
    assert cell.config["seed_everything"] == 4
    assert cell.config["data"] == {"class_path": "EmojiDataModule", "init_args": {"batch_size": 64, "seed": 4}}
    assert cell.config["trainer"]["callbacks"][0]["init_args"]["seed"] == 4
    assert cell.config["trainer"]["max_epochs"] == 2
    assert RECIPE["data"] == "EmojiDataModule"  # left as it was


def test_labels_stand_for_their_values():
    grid = {"model.projection_dim": [16], "on": {"a": {"model.head_norm": "{norm}"}}, "norm": {"null": {}, "true": {}}}
    values = [cell.config["model"]["init_args"]["head_norm"] for cell in Sweep(RECIPE, grid).cells]
    assert values == [None, True]
    assert [cell.labels for cell in Sweep(RECIPE, {"model.head_norm": [None, True, 0.1, "layer"]}).cells] == [
        ("null",),
        ("true",),
        ("0.1",),
        ("layer",),
    ]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("modle.temperature", "Did you mean model"),
        ("trainer.callbacks.StepSed.seed", "name one of StepSeed"),
        ("trainer.callbacks.3.seed", "name one of StepSeed"),
        ("model.warmup_epochs.x", "has no arguments"),
        ("temperature", "be the path of an argument"),
    ],
)
def test_paths_that_do_not_fit_are_refused(path, words):
    import copy

    with pytest.raises(ValueError, match=words):
        set_argument(copy.deepcopy(RECIPE), path, 1)


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_shipped_sweeps_build_their_cells(path, monkeypatch, tmp_path):
    """Every distinct change of a shipped sweep builds; none looks at the test images."""
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    sweep = load_sweep(path.stem)
    cells = list({cell.digest: cell for cell in sweep.cells if cell.seed == sweep.seeds[0]}.values())
    chosen = cells if len(cells) < 8 else cells[:: len(cells) // 4]
    for cell in chosen:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(cell.config))
        cli = main(["--config", str(recipe), *CPU[:2], f"--trainer.default_root_dir={tmp_path}"], run=False)
        assert cli.datamodule.validation_fold == 1
    assert len(cells) > 2


@pytest.mark.slow
def test_a_sweep_runs_resumes_and_tells_failures(tmp_path, monkeypatch, capsys):
    recipe = {
        **RECIPE,
        "trainer": {**RECIPE["trainer"], "max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu"},
    }
    recipe["trainer"] |= {"log_every_n_steps": 1, "limit_val_batches": 0}
    view = {"class_path": "ViewAugmentation", "init_args": {"policy": {"class_path": "simclr_cifar_views"}}}
    recipe["trainer"]["callbacks"] = [*recipe["trainer"]["callbacks"], view]
    spec = {"recipe": recipe, "set": {"data.batch_size": 32}, "grid": {"model.optimizer": ["adamw", "adamww"]}}
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump({**spec, "metrics": ["train/loss"]}))
    arguments = ["sweep", str(path), "--output", str(output)]
    code, out, err = call(arguments, monkeypatch, capsys)
    assert code == 1
    assert "2 to run" in out
    assert out.count("\n  finished after ") == out.count("\n  failed after ") == 1
    assert "failed: `optimizer` must be" in err
    assert "Did you mean 'adamw'" in err
    sweep = load_sweep(str(path))
    found = results(sweep, output)
    (good,) = [one for one in found.values() if one["status"] == "finished"]
    rows = table(sweep, found)
    assert rows[0]["values"] == {"train/loss": [good["metrics"]["train/loss"]]}
    assert (rows[0]["finished"], rows[1]["finished"], rows[1]["failed"]) == (1, 0, 1)
    assert f"| adamw | {good['metrics']['train/loss']:.3f} | 1 |" in (output / "table.md").read_text()
    assert (output / "heat_train_loss.png").stat().st_size > 0
    code, out, _ = call(arguments, monkeypatch, capsys)
    assert "1 runs finished, 1 to run" in out
    equal = ["--grid", "model.optimizer=[adamww]", "--seeds", "0", "1", "--output", str(tmp_path / "equal")]
    code, out, err = call([*arguments, *equal], monkeypatch, capsys)
    assert out.count("\n  failed after ") == 2
    assert err.count("`optimizer` must be") == 1
    assert "error: 2 runs, the first of which is " in err


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_continues_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    whole = main(["fit", *SMALL, *VIEWS, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path / 'whole'}"])
    step = lc.SimCLR.training_step

    def interrupted(module, batch, batch_idx):
        if module.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(module, batch, batch_idx)

    root = f"--trainer.default_root_dir={tmp_path / 'part'}"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    arguments = ["fit", *SMALL, *VIEWS, "--trainer.max_epochs=2", root]
    with monkeypatch.context() as patch:
        patch.setattr(lc.SimCLR, "training_step", interrupted)
        code, _, err = call(arguments, monkeypatch, capsys)
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert code == 130
    assert err.splitlines()[-1] == "error: interrupted"
    (path,) = (tmp_path / "part").rglob("interrupted.ckpt")
    assert lc.checkpoints.load_checkpoint(path)["global_step"] == 5
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    resumed = main([*arguments, "--ckpt_path=last"])
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.slow
def test_the_run_folder_holds_what_a_run_was(tmp_path, monkeypatch):
    arguments = ["fit", *SMALL, *VIEWS, "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", *arguments])
    cli = main()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert "--model=SimCLR" in environment["command"]
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    data = json.loads((tmp_path / "data.json").read_text())
    assert data["train"][0]["items"] == 2492
    assert data["train"][0]["digest"]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "3"), ("1", "6")]
    assert float(rows[-1]["train/loss"]) == float(cli.trainer.callback_metrics["train/loss"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    more = [argument.replace("max_epochs=2", "max_epochs=3") for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", *more, "--ckpt_path=last"])
    main()
    again = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in again] == ["0", "1", "2"]
    assert [row["train/loss"] for row in again[:2]] == [row["train/loss"] for row in rows]
    path, *_ = sorted(tmp_path.rglob("*.ckpt"))
    assert not any(
        "View" in name and "Augmentation" not in name for name in lc.checkpoints.load_checkpoint(path)["callbacks"]
    )


@pytest.fixture
def bad(tmp_path, folder):
    """Return a folder with an unreadable image, a checkpoint of BYOL, and a file where a folder is needed."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    model = lc.BYOL("small_convnet")
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "global_step": 1}
    content["pytorch-lightning_version"] = "2.6.6"
    content["hyper_parameters"]["_class_path"] = "lightning_contrast.methods.byol.BYOL"
    torch.save(content, tmp_path / "byol.ckpt")
    (tmp_path / "torn.ckpt").write_bytes((tmp_path / "byol.ckpt").read_bytes()[:1000])
    return tmp_path


BROKEN = ["--data=ImageFolderDataModule", "--data.train_dir=TMP/broken", "--data.batch_size=1"]
BROKEN += ["--data.num_workers=0", "--data.size=32"]
SQUARE = '--input_spec={"size": 32, "mean": null, "std": null}'
GPU = ["--data=EmojiDataModule", "--device"]
EMOJI_REPORT = ["--data=EmojiDataModule", "--output=TMP/report"]
FIT = ["fit", *SMALL, *VIEWS[:3], "--trainer.max_epochs=1"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["sweeep"], 2, ["`sweeep`", "Did you mean sweep?"]),
        (["methods", "--fromat=csv"], 2, ["`--fromat`", "Did you mean --format?"]),
        (["methods", "--format", "xml"], 2, ["xml", "markdown"]),
        (["views"], 2, ["folder"]),
        (["views", "TMP/nowhere"], 1, ["TMP/nowhere", "be an existing folder"]),
        (["views", "TMP/empty"], 1, ["hold images"]),
        (["views", "TMP/broken", "--size", "32"], 1, ["Cannot read the image TMP/broken/a.png", "Repair or remove"]),
        (["views", "TMP/images", "--policy", "simclr_view"], 2, ["'simclr_view'", "Did you mean simclr_views"]),
        (["views", "TMP/images", "--size", "0"], 1, ["`size` must be >= 1"]),
        (["views", "TMP/images", "--size", "8", "--set", "strenght=1"], 1, ["simclr_views", "strenght"]),
        (["views", "TMP/images", "--size", "8", "--output", "TMP/file/v.png"], 1, ["TMP/file"]),
        (
            ["views", "TMP/images", "--size", "8", "--judge", "--encoder", "TMP/no.pt", "--output", "TMP/v.png"],
            1,
            ["no.pt"],
        ),
        (
            ["views", "TMP/images", "--size", "8", "--judge", "--operations", "huee", "--output", "TMP/v.png"],
            1,
            ["'hue'"],
        ),
        (["sweep"], 2, ["--list"]),
        (["sweep", "temprature"], 1, ["Did you mean temperature"]),
        (["sweep", "simclr_emoji", "--grid", "model.temperature"], 1, ["have a path and a value"]),
        (["sweep", "simclr_emoji", "--grid", "modle.temperature=[1]"], 1, ["Did you mean model"]),
        (["sweep", "simclr_emoji"], 1, ["`grid` must have axes"]),
        ([*FIT, "--trainer.default_root_dir=TMP/file/run"], 1, ["TMP/file"]),
        ([*FIT, "--ckpt_path=TMP/no.ckpt"], 1, ["`ckpt_path` must be an existing checkpoint", "TMP/no.ckpt"]),
        ([*FIT, "--ckpt_path=TMP/byol.ckpt"], 1, ["`ckpt_path` must name a checkpoint of SimCLR", "of BYOL"]),
        ([*FIT, "--ckpt_path=TMP/torn.ckpt"], 1, ["torn.ckpt"]),
        (["predict", *FIT[1:], "--ckpt_path=TMP/byol.ckpt"], 1, ["`ckpt_path` must name a checkpoint of SimCLR"]),
        ([*FIT, "--data=ImageFolderDataModule", "--data.train_dir=TMP/nowhere"], 1, ["`train_dir`", "TMP/nowhere"]),
        ([*FIT, *BROKEN, "--trainer.default_root_dir=TMP/r"], 1, ["Cannot read the image"]),
        (["export", "TMP/byol.ckpt", "n.onnx", "--format=onx"], 2, ["`format` must be one of", "Did you mean onnx?"]),
        (["export", "TMP/byol.ckpt", "n.pt", SQUARE, "--prune=1.5"], 1, ["`prune` must lie in [0, 1)"]),
        (["export", "TMP/no.onnx", "n.pt", SQUARE], 1, ["`model` must hold weights", "TMP/no.onnx"]),
        (["embed", "TMP/file", "v", "--data=EmojiDataModule"], 1, ["`model` must hold weights", "TMP/file"]),
        (["embed", "TMP/byol.ckpt", "v", *GPU, "cuda:99"], 1, ["`device` must be a device of this machine", "cuda:99"]),
        (["embed", "TMP/byol.ckpt", "v", *GPU, "gpuu"], 1, ["`device` must be a device of this machine", "'gpuu'"]),
        (["index", "store", "TMP/images", "--model=TMP/byol.ckpt", "--duplicates=3"], 1, ["`duplicates` must lie in"]),
        (["serve", "TMP/byol.ckpt", "--threads=0"], 1, ["`threads` must be >= 1"]),
        (["report", "TMP/no.ckpt", "--data", "EmojiDataModule", "--output", "TMP/report"], 1, ["no.ckpt"]),
        (["report", "TMP/no.ckpt", *EMOJI_REPORT, "--parts=knn"], 2, ["`parts` must be list or 'all'", "[knn]"]),
        (["report", "TMP/no.ckpt", *EMOJI_REPORT, "--parts=all"], 1, ["no.ckpt"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
@pytest.mark.slow
def test_bad_input_is_one_line_that_says_what_to_do(arguments, status, words, bad, monkeypatch, capsys):
    monkeypatch.chdir(bad)
    code, _, err = call([part.replace("TMP", str(bad)) for part in arguments], monkeypatch, capsys)
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == status, err
    assert len(errors) == 1, err
    assert errors[0] == lines[-1]
    assert len(errors[0]) < 600
    assert all(word.replace("TMP", str(bad)) in errors[0] for word in words), errors
    assert "Traceback" not in err


def test_debug_shows_the_traceback_of_a_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", "views", str(tmp_path / "nowhere"), "--debug"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        entry_point()
