"""The command ``lightning-contrast export``."""

import json

import onnxruntime
import pytest
import torch

import lightning_contrast as lc
from lightning_contrast.cli import main
from lightning_contrast.export import export, read_report

SPEC = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    network = lc.nn.build_backbone("small_convnet", backbone_kwargs={"width": 8}).module
    return export(network, tmp_path / "net.pt", input_spec=SPEC)


def test_a_file_becomes_int8_calibrated_on_a_data_module(exported, tmp_path, capsys):
    arguments = ["--format", "onnx-int8", "--data", "EmojiDataModule", "--images", "60", "--calibration_images", "20"]
    path = main(["export", str(exported), str(tmp_path / "net.onnx"), *arguments, "--tolerance", "0.05"])
    report = read_report(path)
    assert (report.format, report.images, report.source) == ("onnx-int8", 60, "60 images of EmojiDataModule")
    assert report.knn_queries == 30
    assert 0 <= report.knn_after <= 1
    printed = capsys.readouterr().out
    assert printed == f"{report}\n{path}\n"
    kept = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(kept["input_spec"]) == SPEC


def test_what_holds_no_input_needs_one(tmp_path):
    network = lc.nn.build_backbone("resnet10t")
    path = tmp_path / "run.ckpt"
    torch.save({"hyper_parameters": {"backbone": "resnet10t"}, "state_dict": as_backbone(network.module)}, path)
    with pytest.raises(ValueError, match="`input_spec` must be given for a model that does not hold one"):
        main(["export", str(path), str(tmp_path / "net.pt")])
    spec = json.dumps({"size": 32, "mean": None, "std": None})
    found = main(["export", str(path), str(tmp_path / "net"), "--format", "timm", "--input_spec", spec])
    assert (found / "model.safetensors").exists()


def as_backbone(network):
    return {f"backbone.{name}": value for name, value in network.state_dict().items()}
