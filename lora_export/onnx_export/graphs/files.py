"""Graphs whose weights lie in data files beside them, written before any weight is there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.errors import ExportError
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Weight, WeightsMap, placed

if TYPE_CHECKING:
    import numpy as np
    import onnx

INLINE = 1024  # bytes; smaller tensors stay in the graph: ONNX Runtime needs shapes and axes there


def save(
    folder: Path,
    graphs: "Mapping[str, onnx.ModelProto]",
    weights: Sequence[Weight],
    constants: "Mapping[tuple[str, str], np.ndarray[Any, Any]]",
    data_files: Mapping[str, str],
) -> None:
    """Write graphs (file name → model) and weights-map.json, and data files that hold the constants alone.

    An initializer becomes external where a weight of its name belongs to the data file of its graph (data_files:
    graph → data file); graphs that share a data file share the weights in it. constants: values of the weights
    without a recipe, by data file and name. What a recipe makes is left as a hole, for writing.fill.
    """
    laid = placed(weights)
    by_place = {(w.file, w.name): w for w in laid}
    for name, model in graphs.items():
        for tensor in model.graph.initializer:
            weight = by_place.get((data_files[name], tensor.name))
            if weight is not None:
                _make_external(tensor, weight)
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    for file, size in WeightsMap(laid).sizes.items():
        with (folder / file).open("xb") as out:
            out.truncate(size)
            for weight in laid:
                if weight.file == file and not weight.recipe.pieces:
                    out.seek(weight.offset)
                    out.write(_bytes(weight, constants[file, weight.name]))
    weights_map.write(folder, WeightsMap(laid))


def _bytes(weight: Weight, value: "np.ndarray[Any, Any]") -> bytes:
    if value.nbytes != weight.nbytes:
        raise ExportError(
            f"{value.nbytes} bytes were made for an initializer of {weight.nbytes}",
            tensor=weight.name,
            expected=f"{weight.dtype} of shape {list(weight.shape)}",
        )
    return value.tobytes()


def _make_external(tensor: "onnx.TensorProto", weight: Weight) -> None:
    import onnx

    kept = onnx.TensorProto(name=tensor.name, data_type=onnx_type(weight.dtype), dims=weight.shape)
    kept.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", weight.file), ("offset", weight.offset), ("length", weight.nbytes)):
        kept.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(kept)


def onnx_type(dtype: str) -> int:
    """The number of an ONNX type by the name that a weights map has for it."""
    import onnx

    name = {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())
    return int(onnx.TensorProto.DataType.Value(name))
