"""Exported backbones: what is in the files, that they need nothing of this package, and what is refused."""

import copy
import json
import sys

import lightning as L
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.export import export
from tests.launch import run_processes
from tests.tolerances import NETWORK, f32

SPEC = {"size": 12, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}


def convnet(channels=3):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5)
    )
    net.num_features = 4
    net[1].running_mean.uniform_()
    return net


def test_weights_are_plain_and_carry_the_input(tmp_path):
    net = convnet().to(memory_format=torch.channels_last)
    path = export(lc.SupCon(net), tmp_path / "new" / "net.pt", input_spec=SPEC)
    saved = torch.load(path, weights_only=True)
    assert {file.name for file in path.parent.iterdir()} == {"net.pt", "net.pt.parity.json"}
    assert saved.keys() == {"state_dict", "input_spec", "architecture", "features"}
    assert saved["input_spec"] == SPEC
    assert all(tensor.is_contiguous() for tensor in saved["state_dict"].values())
    fresh = convnet()
    nn.init.zeros_(fresh[0].weight)
    fresh.load_state_dict(saved["state_dict"], strict=True)
    images = torch.rand(3, 3, 12, 12)
    torch.testing.assert_close(fresh.eval()(images), net.eval()(images))


@pytest.mark.slow
def test_a_graph_is_self_contained_and_the_model_is_not_modified(tmp_path):
    model = lc.SupCon(convnet().double())
    model.backbone[2].eval()
    before = copy.deepcopy(model.state_dict())
    path = export(model, tmp_path / "net.onnx", format="onnx", input_spec=SPEC)
    modes = [module.training for module in model.backbone]
    assert modes == [True, True, False, True, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.backbone[0].weight.dtype == torch.float64

    onnx.checker.check_model(onnx.load(path))
    session = onnxruntime.InferenceSession(path)
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(float)", [3, 12, 12])
    assert isinstance(given.shape[0], str)  # any number of images
    assert made.name == "features"
    assert json.loads(session.get_modelmeta().custom_metadata_map["input_spec"]) == SPEC
    for count in (1, 5):
        images = torch.rand(count, 3, 12, 12)
        expected = copy.deepcopy(model.backbone).float().eval()(images)
        (features,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), expected, **f32(NETWORK))


@pytest.mark.slow
def test_the_channels_are_those_of_the_network(tmp_path):
    spec = {"size": 12, "mean": None, "std": None}
    path = export(convnet(channels=2), tmp_path / "net.onnx", format="onnx", input_spec=spec)
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape[1:] == [2, 12, 12]


def test_the_timm_network_of_a_masked_transformer_is_written(tmp_path):
    settings = {"img_size": 16, "patch_size": 8, "depth": 1}
    model = lc.IBOT("test_vit", backbone_kwargs=settings, num_prototypes=8, hidden_dim=8, bottleneck_dim=4)
    for network in (model, model.momentum_backbone):
        spec = SPEC | {"size": 16}
        saved = torch.load(export(network, tmp_path / "vit.pt", input_spec=spec), weights_only=True)
        timm.create_model("test_vit", num_classes=0, **settings).load_state_dict(saved["state_dict"], strict=True)


@pytest.mark.slow
def test_the_input_is_that_of_the_trainers_views_and_of_the_checkpoint(tmp_path):
    model = lc.SupCon(convnet(), warmup_epochs=0, optimizer="sgd", lr=0.1)
    policy = lc.augment.simclr_views(12, mean=SPEC["mean"], std=SPEC["std"])
    data = lc.data.EmojiDataModule(batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"default_root_dir": tmp_path, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, callbacks=[lc.ViewAugmentation(policy)], **quiet)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(export(model, tmp_path / "net.pt"), weights_only=True)
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)["input_spec"]
    assert saved["input_spec"] == kept
    assert (kept["size"], kept["mean"], kept["std"]) == (12, pytest.approx(SPEC["mean"]), pytest.approx(SPEC["std"]))


class Doubling(nn.Module):
    """Gives something else in onnxruntime than here: what the comparison has to find."""

    def forward(self, images):
        features = images.mean((2, 3))
        return features * 2 if torch.compiler.is_exporting() else features


@pytest.mark.slow
def test_a_graph_that_differs_is_refused(tmp_path):
    before = tmp_path / "net.onnx"
    before.write_text("an older file")
    for name, format in (("net.onnx", "onnx"), ("net.pt2", "torch_export")):
        with pytest.raises(RuntimeError, match="differ from those of the model by up to 1 of the largest"):
            export(Doubling(), tmp_path / name, format=format, input_spec=SPEC)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert before.read_text() == "an older file"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "tflite"}, ValueError, "`format` must be one of 'state_dict', 'timm', 'onnx', .*, got 'tflite'"),
        ({"input_spec": None}, ValueError, "`input_spec` must hold the size, mean and std of the images, got None"),
        ({"input_spec": {"size": 12}}, ValueError, "`input_spec` must hold the size, mean and std"),
        ({"input_spec": SPEC | {"size": 0}}, ValueError, "`size` must be >= 1, got 0"),
        ({"model": "resnet18"}, TypeError, "`model` must be an nn.Module, got 'str'"),
    ],
)
def test_what_is_refused(tmp_path, arguments, error, message):
    settings = {"model": convnet(), "input_spec": SPEC} | arguments
    with pytest.raises(error, match=message.replace("(", r"\(")):
        export(settings.pop("model"), tmp_path / "net.pt", **settings)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_contrast\[export\]"):
        export(convnet(), tmp_path / "net.onnx", format="onnx", input_spec=SPEC)


@pytest.mark.dist
def test_shards_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def run(rank):
        net = convnet()
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        try:
            export(net, tmp_path / "net.pt", input_spec=SPEC)
        except ValueError as error:
            return str(error)
        return "no error"

    assert all("`model` must have full weights" in message for message in run_processes(run, 2))


def test_a_compiled_module_is_looked_into(tmp_path):
    net = convnet()
    compiled = torch.compile(net, backend="eager")
    saved = torch.load(export(compiled, tmp_path / "net.pt", input_spec=SPEC), weights_only=True)
    assert saved["state_dict"].keys() == net.state_dict().keys()
