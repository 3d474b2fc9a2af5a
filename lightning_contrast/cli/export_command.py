"""The command ``lightning-contrast export``: write a trained backbone in the form that the next tool reads."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_contrast._checks import check_choice, fail, require
from lightning_contrast.cli._command_line import Parser
from lightning_contrast.cli._names import short_names_in_yaml

_DESCRIPTION = (
    "Write the backbone of a checkpoint, an exported backbone (.pt) or a timm model as weights, a timm folder, ONNX, "
    "a program of torch.export, int8 or int4, compare its features with those of the network, and print the report. "
    "With --towers both encoders of an image-text checkpoint are written as ONNX."
)
_TOWERS = ("CLIP", "SigLIP")


def run_export(args: Sequence[str]) -> Path:
    """Parse the arguments of the command, export the model and print the parity report.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The path of the file or folder, with ``--towers`` of the folder of ``image.onnx`` and ``text.onnx``.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
        ValueError: If the checkpoint holds no preprocessing, and none is given, or it is not one of the method that
            ``--towers`` names.
    """
    from lightning_contrast.evaluation import load_subject
    from lightning_contrast.export import ExportFormat, export, read_report

    parser = Parser(prog="lightning-contrast export", description=_DESCRIPTION)
    parser.add_argument("model", type=str, help="path of a checkpoint or an exported backbone, or name of timm")
    parser.add_argument("path", type=str, help="path of the file, or of the folder of timm or of two towers")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=False)
    parser.add_argument("--format", type=ExportFormat, default="state_dict", help="format of the file")
    parser.add_argument("--input_spec", type=dict[str, Any] | None, default=None, help="size, mean and std")
    parser.add_argument("--preprocess", type=bool, default=False, help="uint8 images in; for graphs")
    parser.add_argument("--images", type=int, default=512, help="images that are compared")
    parser.add_argument("--calibration_images", type=int, default=128, help="images of the calibration of int8")
    parser.add_argument("--prune", type=float, default=0.0, help="share of the channels that become 0")
    parser.add_argument("--group_size", type=int, default=32, help="weights that share a scale in int4")
    parser.add_argument("--towers", type=str | None, default=None, help="CLIP or SigLIP: write both encoders")
    parser.add_argument("--tolerance", type=float | None, default=None, help="largest fall of cosine and k-NN")
    with short_names_in_yaml():
        config = parser.parse_args(list(args))
        instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # its name since jsonargparse 4.49
        built = instantiate(config)
    if built.towers is not None:
        return _export_towers(built)
    subject = load_subject(built.model)
    spec = built.input_spec or subject.input_spec
    hint = 'Give --input_spec \'{"size": 224, "mean": [...], "std": [...]}\''
    require(spec is not None, "input_spec", "be given for a model that does not hold one", None, hint)
    names = ("format", "preprocess", "images", "calibration_images", "prune", "group_size")
    chosen = {name: built[name] for name in (*names, "tolerance")}
    path = export(subject.module, built.path, input_spec=spec, data=built.get("data"), **chosen)
    sys.stdout.write(f"{read_report(path)}\n{path}\n")
    return path


def _export_towers(built: Any) -> Path:
    """Write both encoders of an image-text checkpoint, print their reports and return the folder."""
    from lightning_contrast import methods
    from lightning_contrast.checkpoints import load_checkpoint
    from lightning_contrast.export import export_towers, read_report
    from lightning_contrast.exported import INPUT_SPEC

    check_choice("towers", built.towers, _TOWERS)
    check_choice("format", built.format, ("onnx", "onnx-int8"))
    beyond = [name for name, default in (("preprocess", False), ("prune", 0.0)) if built[name] != default]
    require(not beyond, "towers", "be exported without --preprocess and --prune", beyond, "Leave them out")
    saved = load_checkpoint(built.model, map_location="meta")
    try:
        loaded = getattr(methods, built.towers).load_from_checkpoint(built.model, map_location="cpu", weights_only=True)
    except (KeyError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        fail("model", f"be a checkpoint of {built.towers}", built.model, f"Loading it raises {reason}")
    names = ("images", "calibration_images", "tolerance")
    chosen = {name: built[name] for name in (*names, "format")}
    spec = built.input_spec or saved.get(INPUT_SPEC)
    paths = export_towers(loaded.eval(), built.path, input_spec=spec, data=built.get("data"), **chosen)
    for path in paths:
        sys.stdout.write(f"{read_report(path)}\n{path}\n")
    return Path(built.path)
