"""A folder that timm loads by ``local-dir:``: configuration, safetensors, preprocessing and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_contrast._checks import fail, require
from lightning_contrast._version import __version__
from lightning_contrast.export.parity import ParityReport
from lightning_contrast.nn.auxiliary_batchnorm import without_auxiliary
from lightning_contrast.nn.backbones import BUILT_AS

_HINT = "Use format='state_dict', whose file `load_backbone` reads"


def write_folder(backbone: nn.Module, folder: Path, spec: Mapping[str, Any], channels: int) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        backbone: A network that timm built.
        folder: Folder of the files, which exists.
        spec: The ``input_spec``: size, mean, std and resampling become timm's data configuration.
        channels: Channels of the images.

    Raises:
        ValueError: If timm cannot build the network by a name and plain arguments, or prepare its images.
    """
    from safetensors.torch import save_file

    config = getattr(backbone, "pretrained_cfg", None) or {}
    built = getattr(backbone, BUILT_AS, None) or {"small_images": False, "tokens": None, "backbone_kwargs": {}}
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        fail("model", "be a network of timm", type(backbone).__name__, _HINT)
    own = [name for name in ("small_images", "tokens") if built[name]]
    require(not own, "model", "be what timm builds by its name alone", f"a network with {' and '.join(own)}", _HINT)
    beyond = [name for name in ("scale", "window", "indices") if name in spec]
    require(not beyond, "input_spec", "hold only size, mean and std, which timm knows", beyond, _HINT)
    arguments = {name: value for name, value in built["backbone_kwargs"].items() if name != "pretrained"}
    try:
        json.dumps(arguments)
    except TypeError:
        fail("model", "have arguments that fit into JSON", sorted(arguments), _HINT)
    size = spec["size"] if isinstance(spec["size"], list) else [spec["size"]] * 2
    written = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": int(backbone.num_features),  # type: ignore[arg-type]  # timm's networks have it
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "lightning_contrast",
            "custom_load": False,
            "input_size": [channels, *size],
            "fixed_input_size": bool(config.get("fixed_input_size", False)),
            "interpolation": spec.get("interpolation", "bilinear"),
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": spec["mean"] or [0.0] * channels,
            "std": spec["std"] or [1.0] * channels,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": config.get("first_conv"),
            "classifier": config.get("classifier"),
        },
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    weights = without_auxiliary(backbone.state_dict())
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()},
        folder / "model.safetensors",
    )


def load_folder(folder: Path) -> nn.Module:
    """Return the network that timm builds of a folder, in float32 and eval mode.

    Raises:
        ValueError: If the weights do not fit what the name and the arguments build.
    """
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        fail("model", "be what timm builds by its name and arguments", reason, f"Give the backbone by name, or {_HINT}")
    return network.float().eval()


def write_card(folder: Path, report: ParityReport, config: Mapping[str, Any]) -> None:
    """Write ``README.md``, the model card, with the input and the parity report.

    Args:
        folder: The folder, which has a ``config.json``.
        report: The comparison of the loaded folder with the network.
        config: Further lines, by name.
    """
    known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data = known["pretrained_cfg"]
    channels, height, width = data["input_size"]
    lines = "\n".join(f"- {name}: {value}" for name, value in config.items())
    report_text = "\n".join(f"    {line}" for line in str(report).splitlines())
    text = f"""---
library_name: timm
tags:
- image-feature-extraction
- timm
---
# {known["architecture"]}, pretrained without labels

A backbone without a classifier: images to {known["num_features"]} features.
Exported by lightning_contrast {__version__}.
Data, method and license of the weights are to be added by whoever publishes them.

- images: {channels} x {height} x {width}, resized ({data["interpolation"]}, shorter side), center crop
- mean: {data["mean"]}, std: {data["std"]}, of pixels in 0..1
{lines}

## Use

    import timm

    network = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)

## Parity with the trained network

{report_text}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
