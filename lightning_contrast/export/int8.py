"""Static int8 quantization of an ONNX graph, with the operators in float that int8 would change too much."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_contrast.export.graphs import onnx_runner, silent
from lightning_contrast.export.parity import cosines, first_percentile, run_all

_BATCH = 16
_JUDGED = 64
_SHARE = 0.5  # of the tolerance: what one kind of operators may cost alone
_MARGIN = 0.75  # of the tolerance: what all may cost on the calibration images, which other images exceed by chance
_KINDS = [  # those that onnxruntime quantizes, without the ones that only move data
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Softmax"),
    *("LayerNormalization", "InstanceNormalization", "BatchNormalization"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Resize"),
]
_WITH_WEIGHTS = "with weights"
_OF_ACTIVATIONS = "of activations"


class Quantized(NamedTuple):
    """The outcome of a quantization.

    Attributes:
        kinds: Kinds of operators that compute in int8.
        left_in_float: Kinds that int8 would change too much, and the p1 cosine of the features if only they were int8.
    """

    kinds: list[str]
    left_in_float: dict[str, float]


def quantize(source: Path, target: Path, calibration: Tensor, *, folder: Path, tolerance: float) -> Quantized:
    """Write an int8 version of an ONNX file: weights per channel, activations by the ranges of the calibration inputs.

    All operators are quantized first, and stay so if the first percentile of the cosines falls by no more than three
    quarters of the tolerance. If it falls by more, each kind of operators (MatMul with weights and MatMul of two
    activations are different kinds) is quantized alone. A kind that alone costs more than half of the tolerance stays
    in float; if the others together exceed three quarters of it, the one with the lowest cosine follows, and so on.

    Source: onnxruntime's ``quantize_static`` (QDQ, MinMax, int8 weights, uint8 activations); the choice of operators is
    of this package.

    Args:
        source: The float graph, with one input.
        target: Path of the file.
        calibration: Inputs ``(N, ...)``, N >= 1; the cosines are those of the first 64.
        folder: Folder for files in between.
        tolerance: Largest fall of the p1 cosine, in 0..1.

    Raises:
        RuntimeError: If no operator can be quantized.
    """
    import onnx
    from onnxruntime.quantization import quant_pre_process

    prepared = folder / "prepared.onnx"
    with silent("", "onnxruntime"):
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    groups = _groups(model)
    onnx.save(model, prepared)  # nodes got their names
    judged = calibration[:_JUDGED]
    expected = run_all(onnx_runner(prepared), judged)

    def cosine(kinds: list[str], path: Path) -> float:
        _static(prepared, path, model, [name for kind in kinds for name in groups[kind]], calibration, folder)
        return first_percentile(cosines(run_all(onnx_runner(path), judged), expected))

    kinds = list(groups)
    if kinds and 1 - cosine(kinds, target) <= _MARGIN * tolerance:
        return Quantized(kinds, {})
    alone = {kind: cosine([kind], folder / "alone.onnx") for kind in groups}
    kinds = [kind for kind, found in alone.items() if 1 - found <= _SHARE * tolerance]
    while kinds and not 1 - cosine(kinds, target) <= _MARGIN * tolerance:  # the cosine can be NaN
        kinds.remove(min(kinds, key=lambda kind: alone[kind]))
    if not kinds or all(node.op_type != "QuantizeLinear" for node in onnx.load(target).graph.node):
        found = ", ".join(f"{kind} {cosine:.4f}" for kind, cosine in alone.items()) or "no such operators"
        raise RuntimeError(
            f"No operator can be quantized within `tolerance` {tolerance:g}; p1 cosines of each kind alone: {found}. "
            "Nothing was written."
        )
    return Quantized(kinds, {kind: alone[kind] for kind in groups if kind not in kinds})


def _groups(model: Any) -> dict[str, list[str]]:
    """Return the names of the nodes that can be quantized, by kind; nodes without a name get one."""
    constants = {tensor.name for tensor in model.graph.initializer}
    groups: dict[str, list[str]] = {}
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        if node.op_type not in _KINDS:
            continue
        kind = node.op_type
        if kind == "MatMul":
            kind = f"{kind} {_WITH_WEIGHTS if constants & set(node.input) else _OF_ACTIVATIONS}"
        groups.setdefault(kind, []).append(node.name)
    return groups


def _static(prepared: Path, path: Path, model: Any, nodes: list[str], calibration: Tensor, folder: Path) -> None:
    """Quantize some nodes; the ranges of all tensors are measured at the first call and kept in the folder."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Gives the calibration inputs in batches."""

        def __init__(self) -> None:
            name = model.graph.input[0].name
            self.batches: Iterator[dict[str, Any]] = iter({name: b.numpy()} for b in torch.split(calibration, _BATCH))

        def get_next(self) -> dict[str, Any] | None:
            """Return the next batch, or None."""
            return next(self.batches, None)

    with silent("", "onnxruntime"):
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_KINDS),
            per_channel=True,
            activation_type=QuantType.QUInt8,  # onnxruntime has no fast kernels for int8 times int8 on x86
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            calibration_cache_path=folder / "ranges.json",
        )
