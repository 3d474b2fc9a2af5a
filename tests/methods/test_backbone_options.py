"""The arguments of the backbone that every method takes: in Python, in checkpoints and on the command line."""

import contextlib
import io

import pytest
import torch
import yaml
from torch import nn

import lightning_contrast as lc
from lightning_contrast.cli import main
from tests.methods.cases import CASES

METHODS = [name for name in lc.methods.__all__ if name != "SelfSupervisedModule"]
VITS = {"IBOT", "DINOv2", "DINOv3", "MSN", "IJEPA", "MAE", "SimMIM", "Data2Vec", "VJEPA"}


def build(name, **options):
    method = getattr(lc, name)
    vit = "small_video_vit" if name == "VJEPA" else "small_vit"
    first = (vit if name in VITS else "resnet18", *([16] if name in ("NPID", "ExemplarCNN") else []))
    if name in ("Distill", "SEED"):
        first, options = ("resnet18", None), {"teacher_dim": 16} | options
    if name == "BindModalities":
        first = ({"image": "resnet18", "depth": "resnet18"},)
    with torch.device("meta"):
        return method(*first, **options)


def network_of(module):
    """Return the timm network: CPC has it in a grid of patches."""
    return module.backbone.network if isinstance(module.backbone, lc.nn.PatchGrid) else module.backbone


@pytest.mark.parametrize("name", METHODS)
def test_options_reach_the_backbone(name):
    if name in VITS:
        module = build(name, backbone_kwargs={"depth": 1, "embed_dim": 48})
        assert len(getattr(module.backbone, "vit", module.backbone).blocks) == 1
        assert module.feature_dim == 48
        with pytest.raises(ValueError, match="`small_images` must be False"):
            build(name, small_images=True)
        return
    module = build(name, small_images=True, backbone_kwargs={"in_chans": 1})
    network = network_of(module)
    assert (network.conv1.kernel_size, network.conv1.in_channels) == ((3, 3), 1)
    assert isinstance(network.maxpool, nn.Identity)
    assert network_of(build(name)).conv1.kernel_size == (7, 7)
    assert build(name, feature_dim=512).feature_dim == 512


@pytest.mark.parametrize("name", METHODS)
def test_unknown_options_are_refused(name):
    words = r"^`small_image` must be an argument of `\w+`, got True. Did you mean .*'small_images'"
    with pytest.raises(TypeError, match=words):
        build(name, small_image=True)


def test_a_misspelled_argument_is_named_with_the_near_ones_of_the_method_and_its_subclass():
    class Mine(lc.SimCLR):
        def __init__(self, *args, own_weight=1.0, **options):
            super().__init__(*args, **options)

    backbone = CASES["SimCLR"].backbone(True)
    with pytest.raises(TypeError, match=r"`temprature` must be an argument of `SimCLR`, .* Did you mean 'temperature'"):
        lc.SimCLR(backbone, temprature=0.1)
    with pytest.raises(TypeError, match=r"`own_wieght` must be an argument of `Mine`, .* Did you mean 'own_weight'"):
        Mine(backbone, own_wieght=2.0)
    with pytest.raises(TypeError, match=r"`foo` must be .* It takes backbone, head_layers, .*temperature.*lr_schedule"):
        lc.SimCLR(backbone, foo=2.0)


@pytest.mark.parametrize("name", METHODS)
def test_hyperparameters_hold_the_given_options(name):
    options = {"backbone_kwargs": {"drop_path_rate": 0.25}, "feature_dim": 192 if name in VITS else 512}
    if name == "VJEPA":
        options["feature_dim"] = 96
    if name not in VITS:
        options["small_images"] = True
    module = build(name, **options)
    assert {key: module.hparams[key] for key in options} == options
    assert "options" not in module.hparams


@pytest.mark.parametrize("name", ["SimCLR", "DINO", "MoCoV3"])
def test_a_checkpoint_builds_the_same_backbone(name, tmp_path):
    case = CASES[name]
    options = {"small_images": True, "backbone_kwargs": {"width": 4}}
    settings = {"optimizer": "sgd", "lr": 0.1, "warmup_epochs": 0} | case.settings
    module = case.make("small_convnet", **settings, **options)
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "loops": {}}
    torch.save(checkpoint | {"pytorch-lightning_version": "2.6.0"}, tmp_path / "last.ckpt")
    again = case.make.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert again.feature_dim == 32
    assert all(torch.equal(a, again.state_dict()[key]) for key, a in module.state_dict().items())


def command(*arguments):
    data = ["--data", "EmojiDataModule", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    return main(["--model", "SimCLR", "--model.backbone", "small_convnet", *arguments, *data], run=False)


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_takes_them(tmp_path):
    model = command("--model.small_images", "true", "--model.backbone_kwargs", "{width: 4}").model
    assert model.feature_dim == 32
    assert model.backbone.stem[0].stride == (1, 1)
    file = tmp_path / "model.yaml"
    options = {"backbone": "small_convnet", "small_images": True, "backbone_kwargs": {"width": 4}}
    file.write_text(yaml.safe_dump({"model": {"class_path": "SimCLR", "init_args": options}}))
    model = main(["--config", str(file), "--data", "EmojiDataModule", "--trainer.logger", "false"], run=False).model
    assert model.backbone.stem[0].stride == (1, 1)
    assert model.feature_dim == 32


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_shows_them():
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        command("--model.small_images", "true", "--print_config")
    assert yaml.safe_load(output.getvalue())["model"]["init_args"]["small_images"] is True
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        main(["--model.help", "SimCLR"], run=False)
    for name in ("small_images {true,false}", "feature_dim FEATURE_DIM", "backbone_kwargs BACKBONE_KWARGS"):
        assert f"--model.{name}" in output.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_refuses_others(capsys):
    with pytest.raises(SystemExit):
        command("--model.small_image", "true")
    assert "SimCLR has no argument `small_image`. Did you mean small_images" in capsys.readouterr().err
