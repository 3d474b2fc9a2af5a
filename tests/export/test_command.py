"""The command ``lightning-contrast export``."""

import json

import lightning as L
import onnxruntime
import pytest
import torch

import lightning_contrast as lc
from lightning_contrast.cli import main
from lightning_contrast.export import export, read_report
from lightning_contrast.serving import open_embedder
from tests.tolerances import NETWORK, f32

SPEC = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    network = lc.nn.build_backbone("small_convnet", backbone_kwargs={"width": 8}).module
    return export(network, tmp_path / "net.pt", input_spec=SPEC)


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_holds_no_input_needs_one(tmp_path):
    network = lc.nn.build_backbone("resnet10t")
    path = tmp_path / "run.ckpt"
    torch.save({"hyper_parameters": {"backbone": "resnet10t"}, "state_dict": as_backbone(network.module)}, path)
    with pytest.raises(ValueError, match="`input_spec` must be given for a model that does not hold one"):
        main(["export", str(path), str(tmp_path / "net.pt")])
    spec = json.dumps({"size": 32, "mean": None, "std": None})
    found = main(["export", str(path), str(tmp_path / "net"), "--format", "timm", "--input_spec", spec])
    assert (found / "model.safetensors").exists()


@pytest.mark.slow
def test_both_towers_of_a_checkpoint_are_written(tmp_path, capsys):
    torch.manual_seed(0)
    options = {"backbone_kwargs": {"width": 4}, "embedding_dim": 6, "context_length": 12}
    model = lc.CLIP("small_convnet", **options)
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "clip.ckpt", weights_only=True)
    arguments = ["export", str(tmp_path / "clip.ckpt"), str(tmp_path / "towers"), "--input_spec", json.dumps(SPEC)]
    folder = main([*arguments, "--towers", "CLIP", "--format", "onnx"])
    assert {path.name for path in folder.glob("*.onnx")} == {"image.onnx", "text.onnx"}
    assert capsys.readouterr().out.count("cosine: mean 1.000000") == 2
    texts = ["a cat", "a dog"]
    with torch.no_grad():
        expected = model.eval().encode_text(texts)
    found = torch.from_numpy(open_embedder(folder).embed_texts(texts))
    torch.testing.assert_close(found, expected, **f32(NETWORK))
    for more, message in (
        (["--towers", "SimCLR"], "`towers` must be one of 'CLIP', 'SigLIP'"),
        (["--towers", "SigLIP"], "`model` must be a checkpoint of SigLIP"),
        (["--towers", "CLIP", "--format", "timm"], "`format` must be one of 'onnx', 'onnx-int8'"),
        (["--towers", "CLIP", "--prune", "0.5"], "`towers` must be exported without"),
    ):
        with pytest.raises(ValueError, match=message):
            main([*arguments, "--format", "onnx", *more])


def as_backbone(network):
    return {f"backbone.{name}": value for name, value in network.state_dict().items()}
