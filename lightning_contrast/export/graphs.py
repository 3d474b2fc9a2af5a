"""ONNX graphs and programs of `torch.export`, for any batch size."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_contrast.export.parity import Runner
from lightning_contrast.nn import TextTransformer

METADATA_FILE = "metadata.json"
"""Name of the metadata in the file of `torch.export`: its ``extra_files``."""
_EXTRA = "pip install 'lightning_contrast[export]'"


def require_onnx() -> None:
    """Raise unless the packages of the extra are installed.

    Raises:
        ModuleNotFoundError: If one is missing; the message names the extra.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise ModuleNotFoundError(f"ONNX needs onnx, onnxscript and onnxruntime: {_EXTRA}.") from error


def write_onnx(network: nn.Module, example: Tensor, path: Path, names: tuple[str, str]) -> None:
    """Write the graph of a network for any batch size, and for `nn.TextTransformer` any length of the tokens.

    Args:
        network: Float network in eval mode, on the CPU.
        example: An input of two rows, ``(2, ...)``.
        path: Path of the file.
        names: Names of the input and of the output.
    """
    with silent("torch.onnx", "onnxscript", "onnx_ir"):
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            optimize=True,  # without it onnxruntime does not fold BatchNorm into convolutions
            verbose=False,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_shapes=(_dynamic(network, example),),
        )
    assert program is not None
    program.save(path)


def add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write strings into the metadata of an ONNX file."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)


def onnx_runner(path: Path) -> Runner:
    """Return a function that runs an ONNX file on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(given: Tensor) -> Tensor:
        """Return the features (B, F) of a batch."""
        (found,) = session.run(None, {name: given.numpy()})
        return torch.from_numpy(found)

    return run


def write_program(network: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a program of `torch.export` for any batch size; the metadata are its extra file "metadata.json".

    Args:
        network: Float network in eval mode, on the CPU.
        example: An input of two rows, ``(2, ...)``.
        path: Path of the file.
        metadata: Strings by name.
    """
    with torch.no_grad(), silent("torch.export", "torch._export"):
        program = torch.export.export(network, (example,), dynamic_shapes=(_dynamic(network, example),))
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(dict(metadata))})


def program_runner(path: Path) -> Runner:
    """Return a function that runs a program of `torch.export`."""
    module: Any = torch.export.load(path).module()

    def run(given: Tensor) -> Tensor:
        found: Tensor = module(given)
        return found

    return run


def _dynamic(network: nn.Module, example: Tensor) -> dict[int, Any]:
    dynamic = {0: torch.export.Dim("batch")}
    if not example.is_floating_point() and any(isinstance(m, TextTransformer) for m in network.modules()):
        dynamic[1] = torch.export.Dim("length", min=3, max=example.shape[1])
    return dynamic


@contextmanager
def silent(*names: str) -> Iterator[None]:
    """Silence the messages of loggers below ERROR."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
