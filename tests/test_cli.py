"""The command line and the recipes in examples/configs."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_contrast as lc
from lightning_contrast.callbacks import StepSeed
from lightning_contrast.cli import main

# Lightning 2.6 calls jsonargparse in ways that 4.49 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
# Widths that a test cannot wait for; everything else is built as the recipe has it.
SMALL = {"backbone": "resnet10t", "hidden_dim": 16, "predictor_dim": 8, "projection_dim": 8, "queue_size": 64}
SMALL |= {"prototypes": 16, "num_prototypes": 16, "bottleneck_dim": 8}
SMALL_BACKBONES = ("small_convnet", "small_vit")


def method_names():
    return {name for name in lc.methods.__all__ if name != "SelfSupervisedModule"}


def small(path, tmp_path):
    """Write the recipe with narrow heads and a small backbone."""
    recipe = yaml.safe_load(path.read_text())
    arguments = recipe["model"]["init_args"]
    if arguments["backbone"].startswith("vit_"):
        arguments["backbone"] = "vit_tiny_patch16_224"
    elif arguments["backbone"] not in SMALL_BACKBONES:
        arguments["backbone"] = SMALL["backbone"]
    for name in set(SMALL) & set(arguments) - {"backbone"}:
        arguments[name] = SMALL[name]
    written = tmp_path / path.name
    written.write_text(yaml.safe_dump(recipe))
    return recipe, written


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_what_it_names(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])  # Lightning warns of two sources of arguments
    recipe, written = small(path, tmp_path)
    cli = main(["--config", str(written), *CPU, *QUIET, f"--trainer.default_root_dir={tmp_path}"], run=False)
    assert type(cli.model).__name__ == recipe["model"]["class_path"]
    assert type(cli.datamodule).__name__ == recipe["data"]["class_path"]
    assert cli.trainer.max_epochs == recipe["trainer"]["max_epochs"]
    augmentation = next(c for c in cli.trainer.callbacks if isinstance(c, lc.ViewAugmentation))
    policy = recipe["trainer"]["callbacks"][0]["init_args"]["policy"]["init_args"]
    size = policy["size"] if "size" in policy else policy["specs"][0]["size"]
    views = augmentation.policy(torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8))
    count = 1 if type(cli.model) in (lc.NPID, lc.IJEPA) else 2
    assert [view.shape for view in views[:count]] == [(2, 3, size, size)] * count
    assert all(view.shape[2] < size for view in views[count:])  # local ones
    assert any(isinstance(c, StepSeed) for c in cli.trainer.callbacks)


def test_every_method_of_the_contrastive_family_has_three_recipes():
    recipes = {path.stem: yaml.safe_load(path.read_text())["model"]["class_path"] for path in RECIPES}
    named = set(recipes.values())
    assert named <= method_names()
    for method in named:
        stems = {stem.rsplit("_", 1)[1] for stem, name in recipes.items() if name == method}
        assert stems == {"imagenet", "cifar10", "emoji"}, method
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


def test_unknown_short_name_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning_contrast"])
    with pytest.raises(SystemExit):
        main([*SIMCLR, *CPU, *QUIET, VIEWS[0], "--trainer.callbacks.policy=simclr_vews"], run=False)
    assert "simclr_vews" in capsys.readouterr().err


def test_missing_jsonargparse_names_the_extra(monkeypatch):
    import lightning.pytorch.cli as lightning_cli

    def without(*args, **kwargs):
        raise ModuleNotFoundError("Requirement 'jsonargparse[signatures]>=4.39.0' not met.")

    monkeypatch.setattr(lightning_cli, "LightningCLI", without)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning_contrast\[cli\]"'):
        main(["fit"])
