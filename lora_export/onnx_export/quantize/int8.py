"""int8 weights and activations for models that do not generate text, by ONNX Runtime's quantizer.

This changes a finished fp32 graph and follows no recipe: scales of activations come from inputs, and the quantizer
may make anything of a weight. A weights map cannot describe the result, so it cannot be re-weighted.
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export.errors import ExportError
from lora_export.graph_runs.feeds import Feed
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize.settings import chosen
from lora_export.onnx_export.weights.map import Weight

# Not convolutions: on most processors their integer kernels are slower than fp32.
DYNAMIC = ("MatMul", "Attention")
STATIC = ("MatMul", "Gemm")


def quantize_int8(
    graph: Path,
    output: Path,
    calibration: Sequence[Feed] | None = None,
    exclude: Collection[str] = (),
    weights: Sequence[Weight] = (),
) -> tuple[str, ...]:
    """Write `graph` with int8 products to the new file `output`; returns the names of the changed nodes.

    calibration: None finds the range of every activation at run time (MatMulInteger); inputs of the graph fix the
    ranges to those seen on them (QuantizeLinear and DequantizeLinear, which providers fuse). What products give
    stays fp32, for the biases and sums that follow. exclude: nodes to leave unchanged, by patterns (see `chosen`);
    weights: of the graph, for patterns of tensors. Weights have one scale per column and are unsigned, as
    activations are: signed ones can silently saturate on processors without VNNI instructions (ONNX Runtime's
    documentation, "Quantize ONNX Models").

    Weights of more than a few bytes go to `output`.data. The quantizer holds the model in memory once. ExportError
    if the graph is not fp32, or nothing in it can be quantized.
    """
    before = open_model(graph)
    _refuse_other_types(graph, before)
    kinds = DYNAMIC if calibration is None else STATIC
    made_of = {w.name: [piece.tensor for piece in w.recipe.pieces] for w in weights}
    names = {
        str(node.name): [tensor for value in node.inputs if value for tensor in made_of.get(str(value.name), ())]
        for node in before.graph
        if node.op_type in kinds
    }
    skipped = sorted(chosen(names, exclude))
    if calibration is not None and not calibration:
        raise ExportError("there is no input to calibrate with", expected="at least one", where=graph)
    # The quantizer writes beside the graph it reads, and does not accept links as data files.
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=output.parent) as scratch, _quiet():
        source = Path(scratch, graph.name)
        files = {str(t.location) for t in _tensors(before) if isinstance(t, ir.ExternalTensor)}
        for name in (graph.name, *files):
            shutil.copyfile(graph.parent / name, Path(scratch, name))
        _run(source, output, calibration, kinds, skipped)
    touched = _touched(before, open_model(output), kinds)
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
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    common: dict[str, Any] = {
        "op_types_to_quantize": list(kinds),
        "nodes_to_exclude": list(skipped),
        "per_channel": True,
        "weight_type": QuantType.QUInt8,
        "use_external_data_format": True,
    }
    # Shape inference ends at ONNX Runtime's own operators; what follows is fp32 like the whole graph.
    options = {"MatMulConstBOnly": True, "DefaultTensorType": ir.DataType.FLOAT.value}
    if calibration is None:
        quantize_dynamic(source, output, extra_options=options, **common)
    else:
        quantize_static(
            source,
            output,
            _reader(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            extra_options=options | {"OpTypesToExcludeOutputQuantization": list(kinds)},
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
    """On the root logger, the quantizer advises to preprocess the model: engines have done that."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Initializers and constants of all graphs of a model."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
    for node in model.graph.all_nodes():
        yield from (a.as_tensor() for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR)


def _refuse_other_types(path: Path, model: ir.Model) -> None:
    for tensor in _tensors(model):
        if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise ExportError(
                "the graph to be quantized is not in fp32",
                where=path,
                tensor=tensor.name,
                expected="an export with --precision fp32",
            )


def _touched(before: ir.Model, after: ir.Model, kinds: Sequence[str]) -> tuple[str, ...]:
    """Nodes that are gone or have other inputs."""

    def inputs(node: ir.Node) -> list[str | None]:
        return [value.name if value is not None else None for value in node.inputs]

    left = {node.name: inputs(node) for node in after.graph}
    return tuple(str(n.name) for n in before.graph if n.op_type in kinds and left.get(n.name) != inputs(n))
