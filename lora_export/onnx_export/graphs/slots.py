"""A graph that is given its LoRA at run time: inputs in place of weights, and adapters as ONNX Runtime's files.

The inputs default to rank 0, which adds nothing. So a session without an adapter is the base, and an adapter may
have any ranks and leave slots unused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import open_model, serialized
from lora_export.onnx_export.weights.dtypes import Array

SUFFIX = ".onnx_adapter"
_WEIGHT = re.compile(
    r"(?P<module>.*\.layers\.(?P<layer>\d+)\..*?(?P<leaf>[^.]+))\.lora_(?P<side>[AB])\.MatMul\.weight"
)


@dataclass(frozen=True)
class LoraSlot:
    """Where the LoRA of one projection goes. down, up: names of graph inputs of shape (in, r) and (r, out); dtype:
    their ONNX type, lower case."""

    module: str
    layer: int
    leaf: str
    inputs: int
    outputs: int
    dtype: str

    @property
    def down(self) -> str:
        return f"{self.module}.lora_A.MatMul.weight"

    @property
    def up(self) -> str:
        return f"{self.module}.lora_B.MatMul.weight"


def open_slots(path: Path) -> tuple[LoraSlot, ...]:
    """Turn the LoRA weights of an unmerged graph into inputs. ExportError if it has none, or half a pair."""
    model = open_model(path)
    graph = model.graph
    pairs: dict[str, dict[str, ir.Value]] = {}
    for name in list(graph.initializers):
        match = _WEIGHT.fullmatch(name)
        if match:
            pairs.setdefault(match["module"], {})[match["side"]] = graph.initializers.pop(name)
    if not pairs:
        raise ExportError("the graph has no LoRA weights to turn into inputs", where=path, expected="lora_A")
    slots = tuple(_slot(path, module, sides) for module, sides in pairs.items())
    for slot, sides in zip(slots, pairs.values(), strict=True):
        _make_inputs(graph, slot, sides["A"], sides["B"])
    path.write_bytes(serialized(model))
    return slots


def _slot(path: Path, module: str, sides: Mapping[str, ir.Value]) -> LoraSlot:
    if sides.keys() != {"A", "B"}:
        raise ExportError("the graph has only half of a LoRA", where=path, tensor=module, expected="A and B")
    match = _WEIGHT.fullmatch(f"{module}.lora_A.MatMul.weight")
    down, up = (sides[side].const_value for side in "AB")
    assert match is not None and down is not None and up is not None
    dtype = down.dtype.name.lower()
    return LoraSlot(module, int(match["layer"]), match["leaf"], int(down.shape[0]), int(up.shape[1]), dtype)


def _make_inputs(graph: ir.Graph, slot: LoraSlot, down: ir.Value, up: ir.Value) -> None:
    """Make the two matrices inputs that default to rank 0."""
    rank = ir.SymbolicDim(f"rank of {slot.module}")
    for value, shape, empty in (
        (down, [slot.inputs, rank], [slot.inputs, 0]),
        (up, [rank, slot.outputs], [0, slot.outputs]),
    ):
        dtype = ir.DataType[slot.dtype.upper()]
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)
        value.const_value = ir.Tensor(np.empty(empty, dtype.numpy()), dtype=dtype, name=value.name)
        graph.inputs.append(value)
        graph.register_initializer(value)
    # The product between the two has the size of the rank: ONNX Runtime plans memory by these shapes.
    for user, _ in down.uses():
        between = user.outputs[0]
        if between.shape is not None:
            between.shape = ir.Shape([*between.shape[:-1], rank])


def write_adapter(path: Path, matrices: Mapping[LoraSlot, tuple[Array, Array]]) -> None:
    """Write an .onnx_adapter file. matrices: for each slot in use, Aᵀ (in, r) and s·Bᵀ (r, out), in fp32."""
    import onnxruntime as ort

    from lora_export.onnx_export.weights.dtypes import ONNX, rounded

    values = {}
    for slot, (down, up) in matrices.items():
        dtype = ONNX[{"float": "float32"}.get(slot.dtype, slot.dtype)]
        for name, matrix in ((slot.down, down), (slot.up, up)):
            array = np.ascontiguousarray(rounded(np.ascontiguousarray(matrix), dtype))
            values[name] = ort.OrtValue.ortvalue_from_numpy(array)
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    adapter.export_adapter(str(path))
