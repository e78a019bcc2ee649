"""A graph whose LoRA is given when it runs: inputs in place of weights, and adapters as files of ONNX Runtime.

The inputs have defaults of rank 0, which add nothing. So a session without an adapter is the base, and adapters may
have any ranks and leave slots alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import load_graph

if TYPE_CHECKING:
    import onnx

    from lora_export.onnx_export.weights.dtypes import Array

SUFFIX = ".onnx_adapter"
_WEIGHT = re.compile(
    r"(?P<module>.*\.layers\.(?P<layer>\d+)\..*?(?P<leaf>[^.]+))\.lora_(?P<side>[AB])\.MatMul\.weight"
)


@dataclass(frozen=True)
class Slot:
    """Where the LoRA of one projection goes. down, up: names of the graph's inputs of shape (in, r) and (r, out);
    dtype: their ONNX type, lower case."""

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


def open_slots(path: Path) -> tuple[Slot, ...]:
    """Make inputs of the LoRA weights of an unmerged graph. ExportError if it has none, or half a pair."""
    import onnx

    model = load_graph(path)
    found: dict[str, dict[str, onnx.TensorProto]] = {}
    for tensor in model.graph.initializer:
        match = _WEIGHT.fullmatch(tensor.name)
        if match:
            found.setdefault(match["module"], {})[match["side"]] = tensor
    slots = tuple(_slot(path, module, sides) for module, sides in found.items())
    if not slots:
        raise ExportError("the graph has no LoRA that could be given from outside", where=path, expected="lora_A")
    own = {name for s in slots for name in (s.down, s.up)}
    kept = [t for t in model.graph.initializer if t.name not in own]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for slot in slots:
        _add_inputs(model, slot)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return slots


def _slot(path: Path, module: str, sides: "Mapping[str, onnx.TensorProto]") -> Slot:
    import onnx

    if sides.keys() != {"A", "B"}:
        raise ExportError("half of a LoRA is missing in the graph", where=path, tensor=module, expected="A and B")
    match = _WEIGHT.fullmatch(f"{module}.lora_A.MatMul.weight")
    assert match is not None
    dtype = onnx.TensorProto.DataType.Name(sides["A"].data_type).lower()
    return Slot(module, int(match["layer"]), match["leaf"], sides["A"].dims[0], sides["B"].dims[1], dtype)


def _add_inputs(model: "onnx.ModelProto", slot: Slot) -> None:
    from onnx import TensorProto, helper

    kind, rank = TensorProto.DataType.Value(slot.dtype.upper()), f"rank of {slot.module}"
    shapes: list[tuple[str, list[int | str], list[int]]] = [
        (slot.down, [slot.inputs, rank], [slot.inputs, 0]),
        (slot.up, [rank, slot.outputs], [0, slot.outputs]),
    ]
    for name, shape, empty in shapes:
        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
        model.graph.initializer.append(helper.make_tensor(name, kind, empty, b"", raw=True))
    # What lies between the two has the size of the rank: ONNX Runtime plans its memory by these shapes.
    between = {n.output[0] for n in model.graph.node if slot.down in n.input}
    for value in model.graph.value_info:
        if value.name in between:
            value.type.tensor_type.shape.dim[-1].dim_param = rank


def write_adapter(path: Path, matrices: "Mapping[Slot, tuple[Array, Array]]") -> None:
    """An .onnx_adapter file. matrices: for each slot that is used Aᵀ (in, r) and s·Bᵀ (r, out), in fp32."""
    import numpy as np
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
