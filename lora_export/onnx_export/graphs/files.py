"""Graphs with their weights in data files beside them, written before the weights have values."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import serialized
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.dtypes import Array
from lora_export.onnx_export.weights.map import Weight, WeightsMap, placed

INLINE = 1024  # bytes; smaller tensors stay in the graph: ONNX Runtime needs shapes and axes there


def save(
    folder: Path,
    graphs: Mapping[str, ir.Model],
    weights: Sequence[Weight],
    constants: Mapping[tuple[str, str], Array],
    data_files: Mapping[str, str],
) -> None:
    """Write graphs (file name → model), weights-map.json, and data files that contain only the constants.

    An initializer becomes external if a weight of its name belongs to the data file of its graph (data_files: graph
    → data file); graphs with the same data file share its weights. constants: values of the weights without a
    recipe, by data file and name. Weights with a recipe are left as holes, which weights.fill fills.
    """
    laid = placed(weights)
    by_place = {(w.file, w.name): w for w in laid}
    for name, model in graphs.items():
        for value in model.graph.initializers.values():
            weight = by_place.get((data_files[name], str(value.name)))
            if weight is not None:
                value.const_value = ir.ExternalTensor(
                    weight.file, weight.offset, weight.nbytes, onnx_type(weight.dtype),
                    shape=ir.Shape(weight.shape), name=weight.name,
                )  # fmt: skip
        (folder / name).write_bytes(serialized(model))
    for file, size in WeightsMap(laid).sizes.items():
        with (folder / file).open("xb") as out:
            out.truncate(size)
            for weight in laid:
                if weight.file == file and not weight.recipe.pieces:
                    out.seek(weight.offset)
                    out.write(_bytes(weight, constants[file, weight.name]))
    weights_map.write(folder, WeightsMap(laid))


def _bytes(weight: Weight, value: Array) -> bytes:
    if value.nbytes != weight.nbytes:
        raise ExportError(
            f"{value.nbytes} bytes were made for an initializer of {weight.nbytes}",
            tensor=weight.name,
            expected=f"{weight.dtype} of shape {list(weight.shape)}",
        )
    return value.tobytes()


def without_numbers(name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
    """A tensor with a type and a shape, but no values."""
    return ir.ExternalTensor("", 0, 0, dtype, shape=ir.Shape(shape), name=name)


def onnx_type(dtype: str) -> ir.DataType:
    """The ONNX type for a type name of the weights map."""
    return ir.DataType[{"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())]


def map_type(dtype: ir.DataType) -> str:
    """The weights map's name for an ONNX type."""
    name = str(dtype.name)
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())
