"""The fused graphs of an export on the same made-up inputs as graphs without any optimization.

Fusions match patterns, and a pattern that nearly fits computes something else. Outputs are compared with PyTorch
when a merge is validated; an export alone has only this.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.errors import ExportError
from lora_export.onnx_export.graphs.checks import load_graph
from lora_export.onnx_export.weights.dtypes import Array

if TYPE_CHECKING:
    import onnx

RELATIVE = 1e-4  # of the largest value of an output in fp32: another order of additions
# Sizes of axes by the words in their names; each differs from the others and from what a model was traced with.
_SIZES = (
    ("total", 10),
    ("batch", 2),
    ("past", 3),
    ("encoder", 9),
    ("sequence", 7),
    ("height", 0),
    ("width", 0),
    ("channels", 0),
)
_TOKENS = 5  # ids are below this: every vocabulary has so many


def compare(fused: Path, plain: Path, config: Mapping[str, Any], limit: float = RELATIVE) -> float:
    """The largest difference of any output, relative to its largest value. ExportError beyond `limit`."""
    feeds = made_up(load_graph(plain).graph, config)
    expected, found = _run(plain, feeds), _run(fused, feeds)
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())[0]
        raise _refusal(fused, f"only one of the graphs has the output {odd}")
    worst = 0.0
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise _refusal(fused, f"{name} has the shape {list(found[name].shape)} for {list(value.shape)}")
        error = difference(value, found[name])
        if not error <= limit:
            raise _refusal(fused, f"{name} differs by {error:.2g} of its largest value")
        worst = max(worst, error)
    return worst


def difference(expected: Array, found: Array) -> float:
    """The largest difference, relative to the largest value expected; NaN if either has one."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(expected - found).max(initial=0) / np.maximum(np.abs(expected).max(initial=0), 1e-30))


def _run(path: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    from lora_export.runtime import open_session

    session = open_session(path, "cpu")
    names = [o.name for o in session.get_outputs()]
    given = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {n: v for n, v in feeds.items() if n in given}), strict=True))


def made_up(graph: "onnx.GraphProto", config: Mapping[str, Any]) -> dict[str, Array]:
    """Values for every input: seeded noise, small token ids, positions that count, masks of ones."""
    weights = {t.name for t in graph.initializer}
    random = np.random.default_rng(0)
    found = {i.name: _value(i, config, random) for i in graph.input if i.name not in weights}
    if any(n.op_type == "GroupQueryAttention" for n in graph.node):  # takes several tokens after a cache in one row
        found = {name: value[:1] for name, value in found.items()}
    return found


def _value(given: "onnx.ValueInfoProto", config: Mapping[str, Any], random: np.random.Generator) -> Array:
    import onnx

    kind = given.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape = [d.dim_value or _size(d.dim_param, given.name, config) for d in kind.shape.dim]
    if dtype.kind == "f":
        return np.asarray(random.normal(size=shape) / 2, dtype)
    if given.name == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if "mask" in given.name:
        return np.ones(shape, dtype)
    if "type" in given.name:
        return np.zeros(shape, dtype)
    return np.asarray(random.integers(1, _TOKENS, size=shape), dtype)


def _size(axis: str, name: str, config: Mapping[str, Any]) -> int:
    """The size of a symbolic axis; of "a + b" the sum."""
    if "+" in axis:
        return sum(_size(part.strip(), name, config) for part in axis.split("+"))
    if axis.isdigit():
        return int(axis)
    vision = config.get("vision_config") or config
    if re.search("height|width", axis):
        return int(vision.get("image_size", 32))
    if "channels" in axis:
        return int(vision.get("num_channels", 3))
    if name == "input_values" and "batch" not in axis:
        return 16000  # a second of sound
    return next((size for word, size in _SIZES if word in axis), 7)


def _refusal(path: Path, found: str) -> ExportError:
    return ExportError(
        f"the fused graph computes something else than the plain one: {found}",
        where=path,
        expected=f"a difference of at most {RELATIVE:.0e}",
        next_step="--optimize basic, or none; and tell the developers which architecture this is",
    )
