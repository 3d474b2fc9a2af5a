"""Every example and notebook runs as a user would start it, with small settings."""

import contextlib
import csv
import gc
import io
import json
import os
import random
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_contrast as lc
from tests.archives import pack_cifar10
from tests.tolerances import NETWORK, bound, f32

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAIRS = [("seen", "other"), ("unseen", "same"), ("unseen", "other")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def start(path, *arguments, cwd):
    """Run an example in a process of its own and return what it prints."""
    command = [sys.executable, "-W", "ignore", str(path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@contextlib.contextmanager
def as_in_a_new_process(path, arguments, cwd):
    """Give a script its arguments, folder and first place to import from, and restore all global state afterwards.

    The modules of `examples/` that it imports are forgotten: the next script imports them again.
    """
    before = sys.argv, sys.path, Path.cwd(), dict(os.environ), set(sys.modules)
    draws = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    sys.argv, sys.path = [str(path), *arguments], [str(path.parent), *sys.path]
    os.chdir(cwd)
    torch.manual_seed(67280421310721)  # torch's own at the start of a process
    random.seed(0)
    np.random.seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
            gc.collect()  # a file that the script has left open is none of a later test's warnings
    finally:
        sys.argv, sys.path, folder, environment, modules = before
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(path.parent)):
                del sys.modules[name]
        random.setstate(draws[0])
        np.random.set_state(draws[1])
        torch.set_rng_state(draws[2])
        torch.set_default_dtype(numbers[0])
        torch.set_num_threads(numbers[1])
        torch.use_deterministic_algorithms(numbers[2])
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")


def run(path, *arguments, cwd):
    """Run an example as a script, in this process, whose imports are paid for, and return what it prints.

    An exception or an exit with an error fails the test. Larger ones, such as the quickstart, get a process, as a user
    starts it.
    """
    out = io.StringIO()
    with as_in_a_new_process(path, arguments, cwd), contextlib.redirect_stdout(out):
        runpy.run_path(str(path), run_name="__main__")
    return out.getvalue()


def test_a_run_in_this_process_leaves_nothing_behind(tmp_path):
    """Of a script that changes everything, imports a neighbor, and reads its arguments; an exit code is a failure."""
    (tmp_path / "neighbor_of_a_script.py").write_text("WORD = 'found'\n")
    lines = ["import os, random, sys, torch, warnings, neighbor_of_a_script as n", "os.environ['LEFT'] = '1'"]
    lines += ["torch.set_default_dtype(torch.float64); torch.manual_seed(7); random.seed(7); sys.path.append('left')"]
    lines += ["warnings.warn('no error'); assert __name__ == '__main__'; print(n.WORD, sys.argv[1], os.getcwd())"]
    (tmp_path / "script.py").write_text("\n".join([*lines, "raise SystemExit(int(sys.argv[1]))"]))
    drawn, paths = torch.get_rng_state(), list(sys.path)
    folder = Path.cwd()
    for code in ("0", "3"):
        with pytest.raises(SystemExit) as exit_code:
            run(tmp_path / "script.py", code, cwd=tmp_path)
        assert exit_code.value.code == int(code)
        assert "neighbor_of_a_script" not in sys.modules
        assert (Path.cwd(), sys.path, torch.get_default_dtype()) == (folder, paths, torch.float32)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert "LEFT" not in os.environ


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.slow
def test_quickstart(tmp_path):
    out = start(ROOT / "examples" / "quickstart.py", "--epochs", "1", "--output", "out", cwd=tmp_path)
    assert "recall@1" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"pixels", "random", "trained", "seconds", "seed"}
    for name in ("pixels", "random", "trained"):
        assert set(results[name]) == {"knn", "linear", "recall@1"}
        assert all(0 <= value <= 1 for value in results[name].values())
    assert results["pixels"]["knn"] == pytest.approx(0.569, abs=0.002)  # no training in it: the same everywhere
    share = results["pixels"]["knn"]
    assert f"{share:.3f} ± {1.96 * (share * (1 - share) / 312) ** 0.5:.3f}" in out
    for picture in ("views.png", "neighbours.png", "map.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    import torch

    import lightning_contrast as lc

    weights = torch.load(tmp_path / "out" / "backbone.pt", weights_only=True)
    lc.nn.build_backbone("small_convnet").module.load_state_dict(weights)
    again = lc.SimCLR.load_from_checkpoint(tmp_path / "out" / "simclr.ckpt", weights_only=True)
    assert all(torch.equal(again.backbone.state_dict()[name], value) for name, value in weights.items())
    assert any((tmp_path / "out" / "logs").glob("events*"))


@pytest.mark.slow
def test_report(tmp_path):
    """Trains the demo's SimCLR where there is no checkpoint, and continues from its own files."""
    out = start(ROOT / "examples" / "report.py", "--epochs", "1", "--parts", "knn", cwd=tmp_path)
    values = dict(re.findall(r"^(\w+): (0\.\d+)$", out, flags=re.M))
    assert list(values) == ["SimCLR", "random", "pixels", "HOG", "supervised"]
    assert float(values["pixels"]) == pytest.approx(0.569, abs=0.002)  # no training in it: as in the demo
    assert float(values["HOG"]) == pytest.approx(0.596, abs=0.002)
    assert values["random"] != values["SimCLR"]
    folder = tmp_path / "runs" / "report"
    stamps = [(folder / name).stat().st_mtime_ns for name in ("demo/simclr.ckpt", "supervised-1.pt")]
    page = (folder / "report.html").read_text()
    assert len(page) < 5e6
    checkpoint = ("--checkpoint", str(folder / "demo" / "simclr.ckpt"))
    again = start(ROOT / "examples" / "report.py", "--epochs", "1", "--parts", "knn", *checkpoint, cwd=tmp_path)
    assert dict(re.findall(r"^(\w+): (0\.\d+)$", again, flags=re.M)) == values
    assert [(folder / name).stat().st_mtime_ns for name in ("demo/simclr.ckpt", "supervised-1.pt")] == stamps


def test_the_kept_report_is_one_small_page():
    text = (ROOT / "docs" / "report_sample.html").read_text()
    assert len(text) < 5e6
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)
    for name in ("SimCLR", "random", "pixels", "HOG", "supervised"):
        assert f"<b>{name}</b>" in text


@pytest.mark.slow
def test_reconstruct_emoji(tmp_path):
    out = start(ROOT / "examples" / "reconstruct_emoji.py", "--epochs", "3", "--images", "3", cwd=tmp_path)
    errors = re.findall(r"pixels ([\d.]+), of a gray guess ([\d.]+)", out)
    assert len(errors) == 2
    for own, gray in errors:
        assert 0 < float(own) < float(gray)
    for name in ("mae", "simmim"):
        assert (tmp_path / "reconstructions" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_mae_contrast_emoji(tmp_path):
    script = ROOT / "examples" / "mae_contrast_emoji.py"
    start(script, "--epochs", "0", "--weights", "0", "--fold", "1", cwd=tmp_path)
    start(script, "--epochs", "2", "--weights", "0", "1", "--fold", "1", cwd=tmp_path)
    lines = (tmp_path / "mae_contrast_emoji.jsonl").read_text().splitlines()
    random, pixels, contrast = map(json.loads, lines)
    assert [line["weight"] for line in (random, pixels, contrast)] == [0, 0, 1]
    assert pixels["hidden pixels"] < 1 < contrast["hidden pixels"]  # 1: every pixel of a patch is told its mean
    assert contrast["recall@1"] > random["recall@1"]
    assert all(0 < line[key] < 1 for line in (random, pixels, contrast) for key in ("k-NN", "linear", "recall@1"))


@pytest.mark.slow
def test_invariance(tmp_path):
    out = start(
        ROOT / "examples" / "invariance.py", "--epochs", "1", "--samples", "16", "--output", "out", cwd=tmp_path
    )
    assert "without color jitter; knn 0." in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results) == {"random weights", "without color jitter", "with color jitter"}
    assert all(len(result["hue"]) == 4 and 0 < result["neighbor_color"] < 1 for result in results.values())
    assert (tmp_path / "out" / "invariance.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_domain_views(tmp_path):
    run(ROOT / "examples" / "domain_views.py", "--output", "views.png", cwd=tmp_path)
    picture, kept = (path.read_bytes() for path in (tmp_path / "views.png", ROOT / "docs" / "images" / "domains.png"))
    assert picture.startswith(b"\x89PNG")
    assert picture[16:24] == kept[16:24]  # width and height
    assert len(kept) < 300_000


@pytest.mark.slow
def test_probe_your_trainer(tmp_path):
    out = run(ROOT / "examples" / "probe_your_trainer.py", "--epochs", "2", cwd=tmp_path)
    assert "bit-identical with and without the probes: True" in out
    assert "linear_probe/top1" in out


def shares(out, what):
    """Return the figures that follow a word in the output of an example, in order."""
    return [float(value) for value in re.findall(rf"{what}:? ?(0\.\d+|1\.0+)", out)]


@pytest.mark.slow
def test_point_contrast(tmp_path):
    out = run(ROOT / "examples" / "point_contrast.py", "--steps", "40", cwd=tmp_path)
    random, trained = shares(out, "(?:random weights|trained)")
    assert trained > random + 0.1 > 1 / 32  # 0.23 and 0.88 with all steps


@pytest.mark.slow
def test_curl(tmp_path):
    out = run(ROOT / "examples" / "curl.py", "--epochs", "5", cwd=tmp_path)
    random, trained = shares(out, "recall@1")
    assert trained > max(2 * random, 5 / 624)  # 27 times chance with seed 0


@pytest.mark.slow
def test_bind_emoji(tmp_path):
    """Means over both directions: 13 and 4 times chance on fold 1 with seed 0, and at chance with random weights."""
    out = start(ROOT / "examples" / "bind_emoji.py", "--fold", "1", "--epochs", "20", cwd=tmp_path)
    found, chance = shares(out, "@10"), (10 / 934, 10 / 312)
    assert len(found) == 8
    for place, bounds in ((0, (0, 1.6)), (4, (8, 40))):  # random weights, trained
        seen, new = (sum(found[i : i + 2]) / 2 for i in (place, place + 2))
        assert bounds[0] * chance[0] <= seen < bounds[1] * chance[0], out
        assert bounds[0] / 3 * chance[1] <= new < bounds[1] * chance[1], out


@pytest.mark.slow
def test_subclass_a_method(tmp_path):
    out = run(ROOT / "examples" / "subclass_a_method.py", "--epochs", "2", cwd=tmp_path)
    assert "temperature 0.1" in out  # near its end, 0.1
    assert "k-NN top-1" in out


@pytest.mark.slow
@pytest.mark.parametrize(("method", "fold"), [("CLIP", ()), ("SigLIP", ("--fold", "1"))])
def test_clip_emoji(tmp_path, method, fold):
    arguments = ("--epochs", "1", "--method", method, "--output", "out", *fold)
    out = start(ROOT / "examples" / "clip_emoji.py", *arguments, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / f"{method}_0.json").read_text())
    assert '"to_gallery/recall@1"' in out
    sets = [results[f"{things} things, {artist} artist"] for things, artist in PAIRS]
    assert all(len(values) == 8 and values["to_queries/median_rank"] >= 1 for values in sets)
    assert results["groups"]["largest group"] == round(136 / 624, 4)  # also on fold 1
    assert [key for key in results["groups"] if "zero-shot" in key] == [
        f"zero-shot, {words}" for words in ("group names", "words", "names of the training things")
    ]
    assert (tmp_path / "out" / f"{method}_0.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_search_emoji(tmp_path):
    pytest.importorskip("lancedb")
    arguments = ("--epochs", "1", "--words", "cat", "--output", "out")
    out = start(ROOT / "examples" / "search_emoji.py", *arguments, cwd=tmp_path)
    count = len(list((tmp_path / "out" / "images").rglob("*.png")))
    assert f"{count} images, {count} added" in out
    five = r"^(?:cat|picture of [^:]+): (?:(?:un)?seen/.+\.png -?[01]\.\d\d(?:, |$)){5}"
    assert len(re.findall(five, out, flags=re.M)) == 4
    again = start(ROOT / "examples" / "search_emoji.py", *arguments, cwd=tmp_path)
    assert f"{count} images, 0 added" in again  # the same seed gives the same model


@pytest.mark.slow
def test_wrong_captions(tmp_path):
    arguments = ("--epochs", "1", "--share", "0.3", "--output", "out")
    start(ROOT / "examples" / "wrong_captions.py", *arguments, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "SigLIP_0.3_0.json").read_text())
    aurocs = [*results["AUROC, pairs of training, by tenths of the run"], results["AUROC, pairs of unseen things"]]
    assert len(aurocs) == 2
    assert all(0.4 < value < 0.7 for value in aurocs)  # one epoch finds almost none
    assert 0 < results["calibration, seen things, other artist"]["ECE of all pairs"] < 0.1


COMPOSED = runpy.run_path(str(ROOT / "examples" / "composed_scenes.py"))


class Squares:
    """Scenes of a red and a blue square, the red one left in the first, and captions that say so."""

    def masks(self, split):
        masks = torch.zeros(2, 2, 16, 16, dtype=torch.bool)
        for scene, left in enumerate((0, 1)):
            masks[scene, left, 3:7, 1:5] = masks[scene, 1 - left, 5:8, 9:12] = True
        return masks

    def images(self, split):
        images = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
        for image, pair in zip(images, self.masks(split), strict=True):
            for mask, channel in zip(pair, (0, 2), strict=True):
                image[:, mask] = 0
                image[channel, mask] = 255
        return images

    def captions(self, split):
        return ["red left of blue", "red right of blue"]

    def swapped_captions(self, split):
        return ["blue left of red", "blue right of red"]


class Reader(torch.nn.Module):
    """Knows from an image and from a caption on which side red is; the sign of the images' answer is given."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def eval_transform(self, images):
        return images.float() / 255

    def encode_image(self, images):
        columns = torch.arange(16.0)
        red, blue = (((1 - images[:, other]).sum(1) * columns).sum(1) for other in (2, 0))  # what the other lacks
        sizes = [(1 - images[:, other]).sum((1, 2)) for other in (2, 0)]
        return self.sign * torch.sign(red / sizes[0] - blue / sizes[1])[:, None]

    def encode_text(self, texts):
        return torch.tensor([[-1.0 if ("left" in text) == text.startswith("red") else 1.0] for text in texts])


@pytest.mark.parametrize(("sign", "score"), [(1, 1), (-1, 0)])
def test_a_perfect_and_an_inverted_reader_of_scenes(sign, score):
    reader = Reader(sign)
    found = COMPOSED["scores"](reader, reader, Squares(), "train", 2)
    assert found == {"text": score, "image": score, "group": score}


@pytest.mark.slow
def test_composed_scenes(tmp_path):
    arguments = ("--epochs", "1", "--scenes", "256", "--words", "--output", "out")
    start(ROOT / "examples" / "composed_scenes.py", *arguments, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "words_0.json").read_text())
    assert results["scenes of unseen things"]["text"] == 0  # without order both captions are one


@pytest.mark.slow
@pytest.mark.dist
def test_check_lightly(tmp_path):
    out = start(ROOT / "examples" / "check_lightly.py", cwd=tmp_path)
    assert re.findall(r"^NTXentLoss.*: (FOUND|nothing found)$", out, flags=re.M) == ["FOUND", "nothing found"] * 2
    assert "First difference, the loss" in out
    assert "the unsaved buffer `criterion.memory_bank.bank`" in out


@pytest.mark.slow
def test_temporal_emoji(tmp_path):
    rows = ["random", "instance", "instance + temporal"]
    for some, batches in ((rows[:2], ["--batches", "2"]), (rows[2:], [])):  # of the second only that it runs
        arguments = ("--epochs", "2", *batches, "--seeds", "0", "--rows", *some)
        start(ROOT / "examples" / "temporal_emoji.py", *arguments, cwd=tmp_path)
    found = {
        line["row"]: line for line in map(json.loads, (tmp_path / "temporal_emoji.jsonl").read_text().splitlines())
    }
    assert list(found) == rows
    assert found["random"]["moment"] == pytest.approx(0.31, abs=0.02)
    assert found["instance + temporal"]["moment"] > found["random"]["moment"]
    assert all(0 < value < 1 for line in found.values() for key, value in line.items() if " " in key)


@pytest.mark.slow
def test_vjepa_emoji(tmp_path):
    run(ROOT / "examples" / "vjepa_emoji.py", "--epochs", "1", "--batches", "4", "--seeds", "0", cwd=tmp_path)
    random, trained = map(json.loads, (tmp_path / "vjepa_emoji.jsonl").read_text().splitlines())
    assert (random["row"], trained["row"]) == ("random", "V-JEPA")
    assert trained != random | {"row": "V-JEPA"}  # an epoch is too short to learn: see docs/masked.md
    assert all(0 < value < 1 for line in (random, trained) for key, value in line.items() if " " in key)


@pytest.mark.slow
def test_cpc_over_time(tmp_path):
    run(ROOT / "examples" / "cpc_over_time.py", "--epochs", "1", "--batches", "3", cwd=tmp_path)
    results = json.loads((tmp_path / "cpc_over_time.json").read_text())
    random, trained = results["random weights"], results["trained"]
    assert random["of 129"] == pytest.approx(1 / 129, abs=0.003)  # chance
    assert random["of its clip"] == pytest.approx(1 / 16, abs=0.02)
    assert trained.keys() == random.keys()  # an epoch is too short to learn: see docs/time.md
    assert trained["motions, context"] != random["motions, context"]


@pytest.mark.slow
def test_gloria_scenes(tmp_path):
    out = start(
        ROOT / "examples" / "gloria_scenes.py", "--epochs", "1", "--scenes", "256", "--output", "out", cwd=tmp_path
    )
    assert " left of " in out or " above " in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    kinds = ("random weights", "new scenes of things seen in training", "scenes of unseen things")
    for found in (results[kind] for kind in kinds):
        assert 0.05 < found["area of the thing"] < 0.13
        assert found["attention on the thing"] == pytest.approx(found["area of the thing"], abs=0.05)  # hardly trained
        assert 0 < found["attention on the other thing"] < 0.3
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["learned", "worst", "curriculum"])
def test_view_strengths(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "view_strengths.py"))["main"]
    knn, course = main(["--kind", kind, "--epochs", "3", "--batches", "9", "--fold", "1"])
    assert 0.2 < knn < 0.8
    assert len(course) == (0 if kind == "curriculum" else 2)  # every ten steps of 27
    assert all(0 <= strength <= 1 for strength in course)
    if kind == "learned":  # up or down by one step each time
        assert [abs(b - a) for a, b in zip([0.5, *course], course, strict=False)] == pytest.approx([0.05, 0.05])


@pytest.mark.slow
@pytest.mark.parametrize("remedy", ["group DRO", "HSIC", "gradient reversal", "FSCL", "counterfactual pairs"])
def test_fairness_emoji(tmp_path, remedy):
    out = run(ROOT / "examples" / "fairness_emoji.py", "--remedy", remedy, "--epochs", "1", "--fold", "1", cwd=tmp_path)
    found = json.loads(out.splitlines()[-1])
    assert found["images"] == [20, 20, 10, 10]  # activities of men and women, roles of men and women
    assert found["gap"] == pytest.approx(max(abs(found["groups"][i] - found["groups"][i + 1]) for i in (0, 2)))


@pytest.mark.slow
def test_adapt_vit_emoji(tmp_path):
    pytest.importorskip("peft")
    out = run(
        ROOT / "examples" / "adapt_vit_emoji.py", "--epochs", "1", "--pretraining", "0", "--fold", "1", cwd=tmp_path
    )
    rows = {line["row"]: line for line in map(json.loads, re.findall(r"^\{.*\}$", out, flags=re.M))}
    assert list(rows) == ["linear probe", "fine-tuning", "LP-FT", "LoRA"]
    assert rows["linear probe"]["trained"] == 9 * 65
    assert rows["LoRA"]["trained"] == 9 * 65 + 4 * 4 * (64 + 192 + 64 + 64)
    assert rows["LP-FT"]["trained"] == rows["fine-tuning"]["trained"] > 200_000
    assert all(0 < line[artist] < 0.6 for line in rows.values() for artist in ("noto", "fluent"))


@pytest.mark.slow
def test_adapt_clip_emoji(tmp_path):
    out = start(
        ROOT / "examples" / "adapt_clip_emoji.py", "--epochs", "1", "--steps", "10", "--shots", "2", cwd=tmp_path
    )
    found = json.loads(out.splitlines()[-1])
    split = [f"{row}: old, new groups" for row in ("zero-shot", "CoOp", "CoCoOp")]
    assert [row for row in found if row not in ("shots", "seed") and "weight" not in row] == [
        *("zero-shot", "Tip-Adapter", "Tip-Adapter-F", "CoOp", "CoOp, per class", "CoCoOp", *split, "linear probe")
    ]
    assert 0.1 <= found["Tip-Adapter-F: weight, sharpness"][0] <= 100
    assert all(0 <= share <= 1 for row in split for share in found[row])


@pytest.mark.slow
def test_robust_emoji(tmp_path):
    """A larger radius never helps, and RoCL withstands more than SimCLR after two epochs."""
    arguments = ["--rows", "SimCLR", "RoCL", "--seeds", "0", "--fold", "1", "--epochs", "2"]
    out = start(ROOT / "examples" / "robust_emoji.py", *arguments, cwd=tmp_path)
    assert out.count("0/255") == 2
    found = {
        row: json.loads((tmp_path / "robust_emoji" / f"{row}-0-2-1.json").read_text()) for row in ("SimCLR", "RoCL")
    }
    for figures in found.values():
        clean, *attacked = (figures[f"{radius}/255"] for radius in (0, 2, 4, 8))
        assert 0.3 < clean > attacked[0] > attacked[1] >= attacked[2]
    assert found["RoCL"]["2/255"] > found["SimCLR"]["2/255"]


@pytest.mark.slow
def test_change_loss_and_head(tmp_path):
    """One fit per way: by an argument, in a subclass, another head; the others are built."""
    kinds = ["decoupled", "own loss", "own head"]
    script = ROOT / "examples" / "change_loss_and_head.py"
    out = run(script, "--epochs", "1", "--batches", "3", "--variants", *kinds, cwd=tmp_path)
    found = dict(re.findall(r"^(.+): k-NN top-1 (0\.\d+)$", out, flags=re.M))
    assert list(found) == kinds
    assert len(set(found.values())) == 3  # each trains in its own way
    assert all(0.2 < float(value) < 0.8 for value in found.values())
    variants = runpy.run_path(str(script))["VARIANTS"]
    assert len([make() for make in variants.values()]) == 9


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "width"), [("torchvision", 512), ("huggingface vit", 96), ("own", 64)])
def test_own_backbone(tmp_path, backbone, width):
    if backbone.startswith("huggingface"):
        pytest.importorskip("transformers")
    arguments = ("--backbone", backbone, "--epochs", "1", "--batches", "1")
    out = run(ROOT / "examples" / "own_backbone.py", *arguments, cwd=tmp_path)
    rank = re.search(rf"{backbone}: features \(64, {width}\), RankMe (\d+\.\d)", out)[1]
    assert 1 < float(rank) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tuples", "dicts", "huggingface", "webdataset"])
def test_own_data(tmp_path, kind):
    pytest.importorskip(
        {"huggingface": "datasets"}.get(kind, kind) if kind in ("huggingface", "webdataset") else "torch"
    )
    out = run(ROOT / "examples" / "own_data.py", "--kind", kind, "--epochs", "1", "--batches", "4", cwd=tmp_path)
    assert 0.2 < float(re.search(rf"{kind}: k-NN top-1 (0\.\d+)", out)[1]) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("library", ["albumentations", "lightly"])
def test_loader_views(tmp_path, library):
    pytest.importorskip(library)
    arguments = ("--library", library, "--epochs", "1", "--batches", "2", "--workers", "1")
    out = run(ROOT / "examples" / "loader_views.py", *arguments, cwd=tmp_path)
    assert 0.2 < float(re.search(rf"{library}: k-NN top-1 (0\.\d+)", out)[1]) < 0.8


@pytest.mark.parametrize("library", ["albumentations", "lightly"])
@pytest.mark.slow
def test_views_of_the_loader_differ_and_are_normalized_like_the_policy(tmp_path, library):
    pytest.importorskip(library)
    image = lc.data.EmojiDataModule().images("train")[3]
    with as_in_a_new_process(ROOT / "examples" / "loader_views.py", (), tmp_path):
        found = runpy.run_path(str(ROOT / "examples" / "loader_views.py"))
        make, mean, std = found["LIBRARIES"][library], found["MEAN"], found["STD"]
        torch.manual_seed(0)
        first, second = make(32, mean, std)(image), make(32, mean, std)(image)
        torch.manual_seed(0)
        again = make(32, mean, std)(image)
        plain = make(32, mean, std, random=False)(image)
    assert [view.shape for view in (*first, plain)] == [(3, 32, 32)] * 3
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    if library == "albumentations":  # the draws are a function of torch's seed
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    expected = lc.augment.simclr_cifar_views(32, mean=mean, std=std).eval_transform(image[None])[0]
    torch.testing.assert_close(plain, expected, **f32(NETWORK))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gray", "four_bands"])
def test_own_views(tmp_path, kind):
    out = run(ROOT / "examples" / "own_views.py", "--kind", kind, "--images", "128", "--epochs", "2", cwd=tmp_path)
    before, after = map(float, re.search(r"among 128: (\d\.\d+), trained (\d\.\d+)", out).groups())
    assert 1 / 128 < before < after


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("strategy", "held"), [("ddp", "1.00"), ("fsdp", "0.5")])
def test_launch(tmp_path, strategy, held):
    arguments = ("--strategy", strategy, "--devices", "2", "--epochs", "1", "--batches", "2")
    out = start(ROOT / "examples" / "launch.py", *arguments, cwd=tmp_path)
    assert f"{strategy}, 2 processes: loss " in out
    assert f"rank 0 holds {held}" in out
    assert (tmp_path / "launch.ckpt").exists()


@pytest.mark.slow
def test_large_batch(tmp_path):
    out = run(ROOT / "examples" / "large_batch.py", "--batch_size", "128", "--chunk", "16", cwd=tmp_path)
    whole, chunked = map(int, re.findall(r"loss \d\.\d+, (\d+) MB", out))
    assert chunked < whole / 4
    assert float(re.search(r"gradients (\S+)", out)[1]) < bound(NETWORK)
    assert len(set(re.findall(r"loss (\d\.\d{4})", out))) == 1


@pytest.mark.slow
def test_fine_tune(tmp_path):
    arguments = ("--epochs", "3", "--tuning_epochs", "4", "--fold", "1")
    out = run(ROOT / "examples" / "fine_tune.py", *arguments, cwd=tmp_path)
    found = dict(re.findall(r"(pretrained|random): fine-tuned with \d+ labels, top-1 (0\.\d+)", out))
    assert all(0.2 < float(value) < 0.8 for value in found.values())
    assert found["pretrained"] != found["random"]  # three epochs are too short to help
    assert (tmp_path / "pretrained.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SimCLR", "BYOL", "SimSiam"])
def test_regularizers(tmp_path, method):
    arguments = ("--method", method, "--epochs", "1", "--batches", "4", "--fold", "1", "--weight", "10")
    kinds = ["none", "log_det"] if method == "SimCLR" else ["uniformity"]
    run(ROOT / "examples" / "regularizers.py", *arguments, "--regularizers", *kinds, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "regularizers.jsonl").read_text().splitlines()]
    assert [row["regularizer"] for row in rows] == kinds
    assert all(1 < row[f"rank of the {layer}"] < 192 for row in rows for layer in ("features", "projections"))
    if method == "SimCLR":
        assert rows[1]["rank of the features"] > rows[0]["rank of the features"]


@pytest.mark.slow
@pytest.mark.parametrize(("views", "backbone"), [("kornia", "resnet10t"), ("albumentations", "resnet10t")])
def test_simclr_cifar10_from_the_archive_to_the_report(tmp_path, monkeypatch, views, backbone):
    """The archive is unpacked, read, trained on and judged; what is saved gives the accuracy that was logged."""
    from torchvision.datasets import cifar, utils

    if views == "albumentations":
        pytest.importorskip(views)
    for module in (cifar, utils):  # an archive that is made here has another checksum
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    (tmp_path / "data").mkdir()
    written = pack_cifar10(tmp_path / "data", np.random.default_rng(0), rows=8)
    arguments = ("--views", views, "--backbone", backbone, "--epochs", "2", "--batch_size", "16", "--workers", "1")
    out = run(ROOT / "examples" / "simclr_cifar10.py", *arguments, "--output", "out", cwd=tmp_path)
    with (tmp_path / "out" / "metrics.csv").open() as file:
        logged = [float(row["linear_probe/top1"]) for row in csv.DictReader(file) if row["linear_probe/top1"]]
    assert len(logged) == 2  # after each epoch
    report = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert report["top1"] == pytest.approx(logged[-1])
    assert f"{report['top1']:.3f}" in out

    network, _ = lc.nn.build_backbone(backbone, small_images=True)
    network.load_state_dict(torch.load(tmp_path / "out" / "encoder.pt", weights_only=True))
    heads = torch.load(tmp_path / "out" / "heads.pt", weights_only=True)
    assert heads["projector"]["1.layers.0.weight"].shape == (512, 512)  # after the dropout
    fitted, mean, std = heads["logistic_regression"], (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    eval_transform = lc.augment.simclr_cifar_views(32, mean=mean, std=std).eval_transform
    features = [
        lc.evaluation.encode(network, torch.from_numpy(written[part][0]), eval_transform) for part in ("train", "test")
    ]
    logits = (features[1] - features[0].mean(0)) / features[0].std(0, correction=0) @ fitted["weight"].T + fitted[
        "bias"
    ]
    guesses, labels = logits.argmax(1), torch.tensor(written["test"][1])
    assert float((guesses == labels).float().mean()) == pytest.approx(report["top1"])
    for c in labels.unique().tolist():
        assert report[f"class {c}"] == pytest.approx(float((guesses[labels == c] == c).float().mean()))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, not of ours
def test_notebook_runs_with_small_settings(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["LIGHTNING_CONTRAST_NOTEBOOK_EPOCHS"] = "1"
    try:
        NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    finally:
        del os.environ["LIGHTNING_CONTRAST_NOTEBOOK_EPOCHS"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_a_badge_installs_first_and_keeps_its_pictures(path):
    cells = json.loads(path.read_text())["cells"]
    badge = "".join(cells[0]["source"])
    repository = re.search(r"^url = https://github.com/(.*)$", (ROOT / "setup.cfg").read_text(), flags=re.M)[1]
    assert f"colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}" in badge
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "pip install" in "".join(code[0]["source"])
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
