"""int8 weights and activations for the models that do not generate, by ONNX Runtime's quantizer.

A step on a finished fp32 graph, not a recipe: scales of activations come from inputs, and the quantizer makes of
one weight whatever it likes. A weights map describes the result no longer, so it cannot be re-weighted.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import all_tensors, check_external_data, load_graph
from lora_export.onnx_export.graphs.inputs import Feed
from lora_export.onnx_export.graphs.matmuls import kept

if TYPE_CHECKING:
    import onnx

# Convolutions stay: their integer kernels are slower than the ones in fp32 on most processors.
DYNAMIC = ("MatMul", "Attention")
STATIC = ("MatMul", "Gemm")


def quantize_int8(
    graph: Path,
    output: Path,
    calibration: Sequence[Feed] | None = None,
    exclude: Collection[str] = (),
) -> tuple[str, ...]:
    """Write `graph` with products in int8 to the new file `output`; the names of the nodes that were touched.

    calibration: None finds the range of every activation while the model runs (MatMulInteger); inputs of the graph
    fix the ranges to what they are on them (QuantizeLinear and DequantizeLinear, which a provider fuses). exclude:
    nodes that stay, by name or pattern. Weights have a scale a column, and are unsigned as the activations are:
    signed ones can saturate, and nobody sees it, on a processor without VNNI instructions (ONNX Runtime's
    documentation, "Quantize ONNX Models").

    Weights of more than a few bytes go to `output`.data. The quantizer holds the model in memory once. ExportError
    if the file is no fp32 graph, or nothing in it can be quantized.
    """
    before = load_graph(graph)
    check_external_data(graph, before)
    _refuse_other_types(graph, before)
    kinds = DYNAMIC if calibration is None else STATIC
    skipped = [n.name for n in before.graph.node if n.op_type in kinds and kept(n.name, exclude)]
    if calibration is not None and not calibration:
        raise ExportError("there is no input to calibrate with", expected="at least one", where=graph)
    # The quantizer writes beside the graph that it reads, and takes no links for data files.
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=output.parent) as scratch, _quiet():
        source = Path(scratch, graph.name)
        for name in (graph.name, *_data_files(before)):
            shutil.copyfile(graph.parent / name, Path(scratch, name))
        _run(source, output, calibration, kinds, skipped)
    touched = _touched(before, load_graph(output), kinds)
    if not touched:
        raise ExportError(
            "no product in this graph can be quantized to int8",
            where=graph,
            expected=f"nodes with weights ({' or '.join(kinds)}) that are not all excluded",
            next_step="--precision fp16",
        )
    return touched


def _run(
    source: Path, output: Path, calibration: Sequence[Feed] | None, kinds: Sequence[str], skipped: Sequence[str]
) -> None:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    common: dict[str, Any] = {
        "op_types_to_quantize": list(kinds),
        "nodes_to_exclude": list(skipped),
        "per_channel": True,
        "weight_type": QuantType.QUInt8,
        "use_external_data_format": True,
    }
    # Shapes end at ONNX Runtime's own operators; what follows is fp32 as all of the graph.
    options = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
    if calibration is None:
        quantize_dynamic(source, output, extra_options=options, **common)
    else:
        quantize_static(
            source,
            output,
            _reader(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            extra_options=options,
            **common,
        )


def _reader(feeds: Sequence[Feed]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> Any:
            feed = next(self._left, None)
            return None if feed is None else dict(feed)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer advises on the root logger to preprocess: engines have done it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _refuse_other_types(path: Path, model: "onnx.ModelProto") -> None:
    import onnx

    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    for tensor in all_tensors(model):
        if tensor.data_type in halves:
            raise ExportError(
                "the graph that is to be quantized is not in fp32",
                where=path,
                tensor=tensor.name,
                expected="an export with --precision fp32",
            )


def _data_files(model: "onnx.ModelProto") -> set[str]:
    return {e.value for t in all_tensors(model) for e in t.external_data if e.key == "location"}


def _touched(before: "onnx.ModelProto", after: "onnx.ModelProto", kinds: Sequence[str]) -> tuple[str, ...]:
    """Nodes that are gone, or whose inputs are others."""
    left = {n.name: list(n.input) for n in after.graph.node}
    return tuple(n.name for n in before.graph.node if n.op_type in kinds and left.get(n.name) != list(n.input))
