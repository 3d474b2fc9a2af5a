"""The command line and the recipes in examples/configs."""

import gc
import inspect
import math
import runpy
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, Subset

import lightning_contrast as lc
from lightning_contrast.callbacks import StepSeed
from lightning_contrast.cli import entry_point, main
from lightning_contrast.cli._errors import user_message
from lightning_contrast.cli._features import FeatureWriter
from lightning_contrast.nn.multi_crop import count_global_views
from lightning_contrast.testing import run_processes
from tests.recipe_steps import FirstSteps, batch_of, generated
from tests.tolerances import NETWORK, assert_same_bits, f32

# Lightning 2.6 calls jsonargparse in ways that 4.49 has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:The dirpath has changed",  # a resumed run has its own version folder
)

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
# Widths that a test cannot wait for; everything else is built as the recipe has it.
SMALL = {"backbone": "resnet10t", "hidden_dim": 16, "predictor_dim": 12, "projection_dim": 8, "queue_size": 64}
SMALL |= {"prototypes": 16, "num_prototypes": 16, "bottleneck_dim": 8, "whitening_size": 16}
SMALL |= {"map_hidden_dim": 16, "map_projection_dim": 8}
TEACHERS = {128: ("small_convnet", {"width": 16}), 192: ("small_convnet", {})}  # by the width of their features
TEACHERS |= {512: ("resnet10t", {}), 2048: ("resnet14t", {})}
SMALL_BACKBONES = ("small_convnet", "small_vit", "small_video_convnet", "small_video_vit", "r3d_18")


def method_names():
    return {name for name in lc.methods.__all__ if name != "SelfSupervisedModule"}


def small(path, tmp_path):
    """Write the recipe with narrow heads and a small backbone."""
    recipe = yaml.safe_load(path.read_text())
    arguments = recipe["model"]["init_args"]
    backbone = arguments.get("backbone", "small_convnet")  # methods with several encoders name small ones
    if backbone.startswith("vit_"):
        arguments["backbone"] = "vit_tiny_patch16_224"
    elif backbone not in SMALL_BACKBONES:
        arguments["backbone"] = SMALL["backbone"]
    parameters = inspect.signature(getattr(lc, recipe["model"]["class_path"])).parameters
    wide = {name for name, of in parameters.items() if isinstance(of.default, int) and of.default > 4096}
    for name in set(SMALL) & (set(arguments) | wide) - {"backbone"}:
        arguments[name] = SMALL[name]
    if "whitening_size" in arguments:  # needs more images than dimensions
        arguments["projection_dim"] = SMALL["projection_dim"]
    if "num_samples" in arguments and not path.stem.endswith("_emoji"):  # a row of a table for each image
        arguments["num_samples"] = 64
        if path.stem.endswith("_imagenet"):
            arguments["num_negatives"] = 16  # drawn, as in the recipe
    if "text_kwargs" in arguments:
        arguments["text_kwargs"] |= {"width": 32, "layers": 2, "heads": 2}
    if "teacher" in arguments:
        arguments["teacher"], sizes = TEACHERS[arguments["teacher_dim"]]
        arguments["teacher_kwargs"] = {"pretrained": False, **sizes}
    written = tmp_path / path.name
    written.write_text(yaml.safe_dump(recipe))
    return recipe, written


ONE_VIEW = (lc.NPID, lc.ExemplarCNN, lc.IJEPA, lc.CPC, lc.MAE, lc.SimMIM, lc.Data2Vec, lc.BindModalities)
ONE_VIEW += (lc.Distill, lc.SEED)
TEXTS = (lc.CLIP, lc.SigLIP, lc.GLoRIA)  # take one view, and data with captions, which CIFAR-10 and ImageNet lack


@pytest.fixture
def collected():
    """Free a run after the test: its trainer is in cycles with its callbacks, and some hundreds of MB each add up."""
    yield
    gc.collect()


@pytest.mark.slow
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_what_it_names_and_fits_a_step(path, tmp_path, monkeypatch):
    """The step is the first of a run that is planned as the recipe has it, on images that are made up or bundled."""
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])  # Lightning warns of two sources of arguments
    recipe, written = small(path, tmp_path)
    short = ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    root = f"--trainer.default_root_dir={tmp_path}"
    cli = main(["--config", str(written), *CPU, *QUIET, *short, root], run=False)
    assert type(cli.model).__name__ == recipe["model"]["class_path"]
    assert type(cli.datamodule).__name__ == recipe["data"]["class_path"]
    assert cli.trainer.max_epochs == recipe["trainer"]["max_epochs"]
    augmentation = next(c for c in cli.trainer.callbacks if isinstance(c, lc.ViewAugmentation))
    policy = recipe["trainer"]["callbacks"][0]["init_args"]["policy"]["init_args"]
    size = policy["size"] if "size" in policy else policy["specs"][0]["size"]
    if type(cli.model) in (lc.TemporalContrast, lc.TemporalCPC, lc.VJEPA):
        clips = torch.randint(0, 256, (2, cli.datamodule.frames, 3, size, size), dtype=torch.uint8)
        frames = policy["frames"]
        views = {lc.TemporalContrast: 10}.get(type(cli.model), 1)
        assert [view.shape for view in augmentation.policy(clips)] == [(2, frames, 3, size, size)] * views
    else:
        views = augmentation.policy(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
        count = 1 if type(cli.model) in (*ONE_VIEW, *TEXTS) else count_global_views(views)
        assert [view.shape for view in views[:count]] == [(2, 3, size, size)] * count
        assert all(view.shape[2] < size for view in views[count:])  # local ones
    assert any(isinstance(c, StepSeed) for c in cli.trainer.callbacks)

    if path.stem == "temporal_contrast_ucf101":  # 40 clips through a 3-D ResNet: minutes; the emoji recipe has its step
        return
    step, batch = FirstSteps(2 if type(cli.model) is lc.SEED else 1), batch_of(cli.model)  # SEED: with an empty queue 0
    cli.trainer.callbacks.append(step)
    if path.stem.endswith("_emoji"):
        cli.datamodule.batch_size = batch
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    else:
        cli.trainer.fit(cli.model, generated(cli.datamodule, size, batch))
    assert cli.trainer.global_step == step.steps
    assert math.isfinite(step.loss)
    assert 0 < step.gradient < math.inf


OTHER_DATA = {
    "TemporalContrast": {"ucf101", "emoji"},
    "TemporalCPC": {"emoji"},
    "VJEPA": {"emoji"},
    "GLoRIA": {"chexpert", "emoji"},
    "PairContrast": {"emoji"},
    "BindModalities": {"emoji"},
}
"""Data of the recipes of methods that do not train on images alone."""


@pytest.mark.parametrize("name", ["pair_contrast_emoji", "bind_modalities_emoji"])
@pytest.mark.slow
def test_recipes_of_pairs_train_and_their_checkpoints_load(name, tmp_path, monkeypatch):
    """GroupPairs with its source, and encoders and tokenizers by modality, come from the file."""
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    cli = main(["fit", "--config", name, *CPU, *QUIET, *short, "--data.init_args.batch_size=16"])
    assert type(cli.datamodule.source) is lc.data.EmojiDataModule
    (path,) = tmp_path.rglob("*.ckpt")
    loaded = type(cli.model).load_from_checkpoint(path).eval()
    images = torch.rand(2, 3, 32, 32)
    assert_same_bits(loaded(images), cli.model.cpu().eval()(images))
    if name == "bind_modalities_emoji":
        assert loaded.encode("text", ["cat face", "sun"]).shape == (2, 128)
        assert all(cli.trainer.callback_metrics[f"train/loss_{other}"] > 0 for other in ("fluent", "text"))


def test_every_method_of_the_contrastive_family_has_three_recipes():
    recipes = {path.stem: yaml.safe_load(path.read_text())["model"]["class_path"] for path in RECIPES}
    named = set(recipes.values())
    assert named <= method_names()
    for method in named:
        stems = {stem.rsplit("_", 1)[1] for stem, name in recipes.items() if name == method}
        others = {"emoji"} if getattr(lc, method) in TEXTS else {"imagenet", "cifar10", "emoji"}
        assert stems >= OTHER_DATA.get(method, others), method
    assert {"MoCo", "MoCoV3", "MoCHi", "BYOL", "SimSiam", "NPID", "NNCLR", "SupCon", "Triplet"} <= named


@pytest.mark.slow
def test_fit_runs_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = next(path for path in RECIPES if path.stem == "moco_emoji")
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    monkeypatch.setattr(sys, "argv", ["lightning_contrast", "fit", "--config", str(recipe), *CPU, *QUIET, *short])
    cli = main()
    assert cli.trainer.global_step == 2
    assert cli.model.queue.mask.sum() == 2 * 2 * 256  # both keys of both steps
    assert "knn/top1" in cli.trainer.callback_metrics


SIMCLR = ["--seed_everything=0", "--model=SimCLR", "--model.backbone=small_convnet", "--data=EmojiDataModule"]
VIEWS = ["--trainer.callbacks=ViewAugmentation", "--trainer.callbacks.policy.size=24"]


def policy_of(cli):
    return next(callback.policy for callback in cli.trainer.callbacks if isinstance(callback, lc.ViewAugmentation))


@pytest.mark.parametrize("name", ["moco_v2_views", "lightning_contrast.augment.moco_v2_views"])
@pytest.mark.parametrize(
    "option",
    [
        ["--trainer.callbacks.policy=NAME"],
        ["--trainer.callbacks.policy", "NAME"],
        ["--trainer.callbacks.policy.class_path=NAME"],
    ],
    ids=" ".join,
)
def test_policies_have_short_names_on_the_command_line(name, option, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    option = [part.replace("NAME", name) for part in option]
    cli = main([*SIMCLR, *CPU, *QUIET, VIEWS[0], *option, VIEWS[1]], run=False)
    assert policy_of(cli).size == 24
    assert repr(policy_of(cli)) == repr(lc.augment.moco_v2_views(24))


@pytest.mark.parametrize(
    "policy",
    [
        "{class_path: supcon_views, init_args: {size: 24}}",
        "{class_path: lightning_contrast.augment.supcon_views, init_args: {size: 24}}",
    ],
    ids=["short", "import path"],
)
def test_policies_have_short_names_in_yaml(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
seed_everything: 0
model: {{class_path: SupCon, init_args: {{backbone: small_convnet}}}}
data: EmojiDataModule
trainer:
  default_root_dir: supcon_views
  callbacks:
    - class_path: ViewAugmentation
      init_args: {{policy: {policy}}}
""")
    cli = main(["--config", str(path), *CPU, *QUIET], run=False)
    assert repr(policy_of(cli)) == repr(lc.augment.supcon_views(24))
    assert cli.trainer.default_root_dir.endswith("supcon_views")
    assert "augment" not in cli.trainer.default_root_dir  # the name of a policy elsewhere is left as it is


def run_command(arguments, monkeypatch, capsys):
    """Run the console script; return its exit status and the lines on stderr."""
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        entry_point()
    return ended.value.code, capsys.readouterr().err.splitlines()


EMOJI = ["fit", "--config", "simclr_emoji"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["fti", "--config", "simclr_emoji"], 2, ["`fti`", "Did you mean fit?"]),
        (["fit", "--config", "simclr_emojis"], 2, ["simclr_emojis", "Did you mean simclr_emoji "]),
        (["fit", "--config", "/no/such.yaml"], 2, ["/no/such.yaml"]),
        ([*EMOJI, "--model", "SimCRL"], 2, ["'SimCRL'", "Did you mean SimCLR?"]),
        ([*EMOJI, "--model", "timm.Foo"], 2, ["timm.Foo", "has no attribute 'Foo'"]),
        ([*EMOJI, "--model.temprature=0.1"], 2, ["SimCLR", "`temprature`", "Did you mean temperature?"]),
        ([*EMOJI, "--model.temperature=warm"], 2, ["`temperature` must be float", "got warm"]),
        ([*EMOJI, "--model.optimizer=adamww", *CPU], 1, ["`optimizer`", "'adamww'", "Did you mean 'adamw'"]),
        ([*EMOJI, "--data", "EmojiDataModul"], 2, ["'EmojiDataModul'", "Did you mean EmojiDataModule "]),
        ([*EMOJI, "--data.batch_sise=8"], 2, ["EmojiDataModule", "Did you mean batch_size or batches?"]),
        ([*EMOJI, "--trainer.callbacks+=OnlineKnn"], 2, ["'OnlineKnn'", "Did you mean OnlineKNN?"]),
        ([*EMOJI, "--trainer.callbacks.num_classes=nine"], 2, ["`num_classes` must be int", "got nine"]),
        ([*EMOJI, "--trainer.max_epochz=1"], 2, ["trainer.max_epochz", "Did you mean trainer.max_epochs "]),
        ([*EMOJI, "--trainr.max_epochs=1"], 2, ["trainr.max_epochs", "Did you mean trainer.max_epochs?"]),
        (["fit", "--model", "SimCLR", "--data", "EmojiDataModule"], 2, ["SimCLR", "backbone"]),
        (
            [*EMOJI, *CPU, *QUIET, "--data", "ImageFolderDataModule", "--data.train_dir", "/no/images"],
            1,
            ["`train_dir`", "/no/images"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_line_with_near_names(arguments, status, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, lines = run_command(arguments, monkeypatch, capsys)
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == status
    assert len(errors) == 1
    assert errors[0] == lines[-1]
    assert len(errors[0]) < 500
    assert all(word in errors[0] for word in words), errors
    assert not any("Traceback" in line or "usage:" in line for line in lines)


@pytest.mark.slow
def test_typo_in_a_recipe_is_one_line(tmp_path, monkeypatch, capsys):
    recipe = next(path for path in RECIPES if path.stem == "simclr_emoji").read_text()
    for right, wrong in (("temperature", "temprature"), ("OnlineKNN", "OnlineKN"), ("max_epochs", "max_epoch_s")):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe.replace(right, wrong))
        code, lines = run_command(["fit", "--config", str(path)], monkeypatch, capsys)
        assert (code, len(lines)) == (2, 1)
        assert wrong in lines[0]
        assert right in lines[0].split("Did you mean")[1]


@pytest.mark.slow
def test_debug_shows_the_traceback(tmp_path, monkeypatch, capsys):
    import argparse

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", *EMOJI, "--model", "SimCRL", "--debug"])
    with pytest.raises(argparse.ArgumentError, match="SimCRL"):
        entry_point()
    folder = ["--data", "ImageFolderDataModule", "--data.train_dir", "/no/images"]
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", *EMOJI, *CPU, *QUIET, *folder, "--debug"])
    with pytest.raises(FileNotFoundError, match="/no/images"):
        entry_point()


def test_only_errors_of_the_user_lose_their_traceback(tmp_path):
    from urllib.error import URLError

    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    def message(error):
        try:
            raise error
        except Exception as raised:  # noqa: BLE001
            return user_message(raised)

    assert message(URLError("Name or service not known")) == "<urlopen error Name or service not known>"
    assert message(PermissionError(13, "Permission denied", "/root/run")) == "[Errno 13] Permission denied: '/root/run'"
    assert message(MisconfigurationException("No\n  loader")) == "No loader"
    unreachable = type("ConnectError", (Exception,), {"__module__": "httpx"})
    assert message(unreachable("no route")) == "ConnectError: no route"
    assert message(ValueError("a bug of a user's module")) is None
    assert message(ZeroDivisionError("division by zero")) is None
    with pytest.raises(ValueError, match="start") as own:
        lc.MomentumUpdate(start=2.0)
    assert "`start` must lie in [0, 1]" in user_message(own.value)


@pytest.mark.slow
def test_help_of_a_class_is_short(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", "fit", "--model.help", "SimCLR"])
    with pytest.raises(SystemExit) as ended:
        entry_point()
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(text.splitlines()) < 150
    assert all(f"--model.{name} " in text for name in ("backbone", "temperature", "optimizer"))
    monkeypatch.setattr(sys, "argv", ["lightning-contrast", "fit", "--model.help"])
    with pytest.raises(SystemExit):
        entry_point()
    named = {line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]}
    assert named == method_names()


def test_module_and_console_script_are_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast", "fti"])
    with pytest.raises(SystemExit):
        runpy.run_module("lightning_contrast", run_name="__main__")
    assert "Did you mean fit?" in capsys.readouterr().err


@pytest.mark.slow
def test_recipes_are_found_by_name_and_files_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    monkeypatch.chdir(tmp_path)
    cli = main(["--config=simclr_emoji", "--trainer.max_epochs=3", *CPU, *QUIET], run=False)
    assert (type(cli.model), cli.trainer.max_epochs) == (lc.SimCLR, 3)
    Path("simclr_emoji").write_text(
        "{data: EmojiDataModule, model: {class_path: BYOL, init_args: {backbone: small_convnet}}}"
    )
    assert type(main(["-c", "simclr_emoji", *CPU, *QUIET], run=False).model) is lc.BYOL


RUN = [
    "--trainer.limit_train_batches=2",  # 1 is read as all of them
    "--trainer.limit_val_batches=0",
    "--model.warmup_epochs=0",
]
RUN += ["--trainer.callbacks=ViewAugmentation", "--trainer.callbacks.policy=simclr_cifar_views"]
RUN += ["--trainer.callbacks.policy.size=32", "--data.batch_size=32", "--trainer.log_every_n_steps=1", *CPU, *QUIET[1:]]


def fit(root, *arguments, monkeypatch, command="fit"):
    options = [f"--trainer.default_root_dir={root}", "--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={root}"]
    monkeypatch.setattr(sys, "argv", ["lightning_contrast", command, *SIMCLR, *RUN, *options, *arguments])
    return main()


@pytest.mark.slow
def test_last_resumes_the_newest_intact_checkpoint_over_version_folders(tmp_path, monkeypatch, capsys):
    fit(tmp_path, "--trainer.max_epochs=1", monkeypatch=monkeypatch)
    second = fit(tmp_path, "--trainer.max_epochs=2", "--ckpt_path", "last", monkeypatch=monkeypatch)
    assert second.trainer.log_dir.endswith("version_1")
    assert second.trainer.ckpt_path.endswith("version_0/checkpoints/epoch=0-step=2.ckpt")
    assert (second.trainer.current_epoch, second.trainer.global_step) == (2, 4)  # one epoch of its own
    (tmp_path / "lightning_logs/version_1/checkpoints/epoch=1-step=4.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"version_1.* is empty .* skipped"):
        third = fit(tmp_path, "--trainer.max_epochs=2", "--ckpt_path=last", monkeypatch=monkeypatch)
    assert "version_0" in third.trainer.ckpt_path
    other = ["--model=BYOL", "--model.backbone=small_convnet", "--trainer.max_epochs=3", "--ckpt_path=last"]
    with pytest.raises(ValueError, match=r"name a checkpoint of BYOL.* of SimCLR"):
        fit(tmp_path, *other, monkeypatch=monkeypatch)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_last_without_a_checkpoint_fails(command, tmp_path, monkeypatch, capsys):
    options = [f"--trainer.default_root_dir={tmp_path}", "--ckpt_path=last", *QUIET, *CPU]
    code, lines = run_command([command, *SIMCLR, *options], monkeypatch, capsys)
    assert code == 1
    assert "`ckpt_path` must name a run with an intact checkpoint" in lines[-1]
    assert str(tmp_path / "lightning_logs") in lines[-1]
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_predict_writes_features_of_the_checkpoint(tmp_path, monkeypatch, capsys):
    trained = fit(tmp_path, "--trainer.max_epochs=1", monkeypatch=monkeypatch)
    capsys.readouterr()
    predicting = fit(tmp_path, "--ckpt_path=last", monkeypatch=monkeypatch, command="predict")
    path = Path(predicting.trainer.log_dir) / "features.npz"
    written = load(path)
    images = trained.datamodule.images("val")
    policy = lc.augment.simclr_cifar_views(32)
    trained.model.eval()
    with torch.no_grad():
        expected = trained.model(policy.eval_transform(images))
    torch.testing.assert_close(torch.from_numpy(written["features"]), expected, **f32(NETWORK, size=0.1))
    labels = torch.cat([batch[1] for batch in trained.datamodule.val_dataloader()])
    assert written["labels"].tolist() == labels.tolist()
    assert written["indices"].tolist() == list(range(len(images)))


def load(path):
    with np.load(path) as file:
        return dict(file)


class Rows(torch.utils.data.Dataset):
    samples = tuple((f"/images/{row}.png", row % 3) for row in range(10))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, row):
        return torch.full((1, 2, 2), float(row)), self.samples[row][1]


class Mean(L.LightningModule):
    def __init__(self, form=lambda features: features):
        super().__init__()
        self.form = form

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.form(batch[0].flatten(1).bfloat16())


def predict(tmp_path, loaders, form=lambda features: features, **ranks):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[FeatureWriter()],
        default_root_dir=tmp_path,
        **ranks,
    )
    trainer.predict(Mean(form), loaders, return_predictions=False)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_feature_writer_keeps_rows_labels_and_paths_together(tmp_path):
    order = [7, 2, 9, 4, 0]
    predict(tmp_path, DataLoader(Subset(Rows(), order), batch_size=2), lambda features: {"features": features})
    written = load(tmp_path / "features.npz")
    assert written["features"].shape == (5, 4)
    assert written["features"][:, 0].tolist() == order
    assert written["labels"].tolist() == [row % 3 for row in order]
    assert written["paths"].tolist() == [f"/images/{row}.png" for row in order]
    predict(tmp_path, [DataLoader(Rows(), batch_size=4), DataLoader(Subset(Rows(), [3, 1]), batch_size=4)])
    assert len(load(tmp_path / "features_0.npz")["features"]) == 10
    assert load(tmp_path / "features_1.npz")["features"][:, 0].tolist() == [3, 1]


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_feature_writer_joins_two_ranks_in_the_order_of_the_set(tmp_path):
    order = [7, 2, 9, 4, 0]

    def on_rank(rank):
        loaders = [DataLoader(Subset(Rows(), order), batch_size=2), DataLoader(Rows(), batch_size=3)]
        predict(tmp_path, loaders, strategy="ddp", devices=2)

    run_processes(on_rank, 2, init=False)
    for number, rows in enumerate([order, list(range(10))]):
        written = load(tmp_path / f"features_{number}.npz")
        assert written["features"][:, 0].tolist() == rows
        assert written["labels"].tolist() == [row % 3 for row in rows]
        assert written["indices"].tolist() == list(range(len(rows)))
        assert written["paths"].tolist() == [f"/images/{row}.png" for row in rows]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:predict returned None")
def test_feature_writer_refuses_what_it_cannot_write(tmp_path):
    loader = DataLoader(Rows(), batch_size=5)
    with pytest.raises(TypeError, match=r"`predict_step` must return features \(B, F\), got 'list'"):
        predict(tmp_path, loader, lambda features: [features])
    predict(tmp_path, loader, lambda features: None)
    assert not list(tmp_path.rglob("*.npz"))


def test_unknown_short_name_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    with pytest.raises(SystemExit):
        main([*SIMCLR, *CPU, *QUIET, VIEWS[0], "--trainer.callbacks.policy=simclr_vews"], run=False)
    assert "simclr_vews" in capsys.readouterr().err


def test_missing_jsonargparse_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_contrast\[cli\]"'):
        main(["fit"])
    assert run_command(["fit"], monkeypatch, capsys)[0] == 1
