"""Small exported models for the tests of the service and of image search, made once per process."""

import functools
import io
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import nn

import lightning_contrast as lc
from lightning_contrast import export

SPEC = {"size": [20, 24], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


@functools.cache
def folder():
    """Return a folder that lives as long as the process."""
    made = tempfile.TemporaryDirectory(prefix="served_models_")
    KEPT.append(made)
    return Path(made.name)


KEPT = []


def network(seed=0):
    """Return a network whose features differ for images that differ in any region."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 5 * 6, 12))


@functools.cache
def image_model(seed=0):
    """Return the path of an ONNX graph of images."""
    path = folder() / f"network_{seed}.onnx"
    return export.export(network(seed), path, format="onnx", input_spec=SPEC)


@functools.cache
def towers():
    """Return the folder of the ONNX graphs of an image-text model, and the model."""
    torch.manual_seed(0)
    model = lc.CLIP(network(), embedding_dim=6, feature_dim=12, context_length=40)
    export.export_towers(model.eval(), folder() / "towers", input_spec=SPEC)
    return folder() / "towers", model


def expected(pixels, path=None):
    """Return the output for pixels (3, H, W), by a session and a policy of its own."""
    images = lc.augment.ViewPolicy.from_input_spec(SPEC).eval_transform(pixels[None])
    session = onnxruntime.InferenceSession(str(path or image_model()), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0][0]


def picture(seed=0, size=(30, 40)):
    """Return an image of smooth random colors, of height and width."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    """Return the content of a file of an image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
