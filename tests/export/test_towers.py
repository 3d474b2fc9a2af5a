"""Both towers of an image-text model in int8, calibrated on pairs."""

import json

import onnxruntime
import pytest
import torch

import lightning_contrast as lc
from lightning_contrast.export import export_towers, read_report

SPEC = {"size": 16, "mean": None, "std": None}
WORDS = ["a dot", "red", "a green line", "blue", "two rows of dots", "nothing", "white", "gray"]


def clip():
    torch.manual_seed(0)
    text = {"width": 32, "layers": 2, "heads": 2}
    settings = {"backbone_kwargs": {"width": 4}, "embedding_dim": 16, "context_length": 24, "text_kwargs": text}
    return lc.CLIP("small_convnet", **settings).eval()


def pairs(count=6):
    """Return batches of 8 images and their texts."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 8, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return [(batch, [f"{word} {number}" for word in WORDS]) for number, batch in enumerate(images)]


@pytest.mark.slow
def test_int8_towers_are_close_on_pairs_that_did_not_calibrate(tmp_path):
    module, data = clip(), pairs()
    options = {"format": "onnx-int8", "input_spec": SPEC, "calibration_images": 16, "tolerance": 0.05}
    paths = export_towers(module, tmp_path / "towers", data=data, **options)
    for path, kind in zip(paths, ("images", "texts"), strict=True):
        report = read_report(path)
        assert (report.format, report.source) == ("onnx-int8", f"32 {kind} of list")
        assert report.quantized
        assert 0.95 <= report.cosine_p1 < 1
    with torch.no_grad():
        expected = module.encode_text(data[5][1])
    tokens = module.tokenizer(data[5][1])
    session = onnxruntime.InferenceSession(paths[1])
    found = torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])  # shorter than the context
    assert float((found * expected).sum(1).min()) > 0.9
    maps = [onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map for path in paths]
    assert maps[0]["model_digest"] == maps[1]["model_digest"]
    assert (maps[1]["context_length"], maps[0]["embedding_dim"], maps[1]["embedding_dim"]) == ("24", "16", "16")
    assert json.loads(maps[0]["input_spec"]) == SPEC


def test_towers_need_texts_for_int8_and_leave_no_file(tmp_path):
    options = {"format": "onnx-int8", "input_spec": SPEC}
    with pytest.raises(ValueError, match="`data` must be given for format='onnx-int8'"):
        export_towers(clip(), tmp_path / "a", **options)
    with pytest.raises(ValueError, match="`data` must have texts"):
        export_towers(clip(), tmp_path / "b", data=torch.rand(32, 3, 16, 16), **options)
    assert list(tmp_path.iterdir()) == []
