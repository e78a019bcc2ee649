"""What a graph reads and returns: names, types and axes, and which output continues which cache."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ml_dtypes
import numpy as np

from lora_export.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

Array = np.ndarray[Any, Any]
IDS, MASK, POSITIONS, TYPES, LOGITS = "input_ids", "attention_mask", "position_ids", "token_type_ids", "logits"
WAVE, SPECTRUM, PIXELS, EMBEDS = "input_values", "input_features", "pixel_values", "inputs_embeds"
PIXEL_MASK, BOXES, DECODER_IDS = "pixel_mask", "bbox", "decoder_input_ids"
GRIDS = ("image_grid_thw", "grid_thw")  # (pictures, 3): patches along time, height and width
AUDIO = "audio_features"  # onnxruntime-genai's name of Whisper's input_features
STATES, ENCODER_MASK = "encoder_hidden_states", "encoder_attention_mask"
_FLOATS = {"float": "float32", "double": "float64"}
_HEADS, _HEAD_SIZE = (1, "num_key_value_heads"), (3, "head_size")  # axis of a cache, key of genai_config.json


def numpy_dtype(onnx_type: str) -> "np.dtype[Any]":
    """The numpy type of `tensor(float16)` and its like; bfloat16 is ml_dtypes' own."""
    element = onnx_type.removeprefix("tensor(").removesuffix(")")
    if element == "bfloat16":
        return cast("np.dtype[Any]", np.dtype(ml_dtypes.bfloat16))
    return np.dtype(_FLOATS.get(element, element))


@dataclass(frozen=True)
class GraphValue:
    """An input or output of a graph. type: `tensor(float16)` or the like; shape: sizes, or names of axes."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def dtype(self) -> "np.dtype[Any]":
        return numpy_dtype(self.type)

    @property
    def is_cache(self) -> bool:
        return self.name.startswith("past")


@dataclass(frozen=True)
class Signature:
    """Outputs, and inputs without a default, by name. path: the graph's file, if it has one."""

    inputs: Mapping[str, GraphValue]
    outputs: Mapping[str, GraphValue]
    path: Path | None = None

    @classmethod
    def of_session(cls, session: "onnxruntime.InferenceSession") -> "Signature":
        path = getattr(session, "_model_path", None)
        inputs, outputs = (
            {v.name: GraphValue(v.name, v.type, tuple(v.shape)) for v in values}
            for values in (session.get_inputs(), session.get_outputs())
        )
        return cls(inputs, outputs, Path(path) if path else None)

    @classmethod
    def of_model(cls, model: "ir.Model", path: Path | None = None) -> "Signature":
        graph = model.graph
        inputs = {str(v.name): _of_value(v) for v in graph.inputs if v.name not in graph.initializers}
        return cls(inputs, {str(v.name): _of_value(v) for v in graph.outputs}, path)

    @functools.cached_property
    def cache(self) -> Mapping[str, str]:
        """Input with past keys or values → the output that continues it."""
        continued = {read_as(name): name for name in self.outputs}
        return {name: continued[name] for name, v in self.inputs.items() if v.is_cache and name in continued}

    def require_cache(self) -> None:
        """InputError unless this is a decoder that continues its whole cache."""
        past = {name for name, v in self.inputs.items() if v.is_cache}
        if (
            not self.inputs.keys() & {IDS, EMBEDS}
            or LOGITS not in self.outputs
            or not past
            or past != self.cache.keys()
        ):
            raise InputError(
                "the model is not a decoder with a KV cache",
                where=self.path,
                expected="input_ids, past_key_values.N.key and .value, logits, present.N.key and .value",
            )

    def cache_shape(self, name: str, rows: int, length: int) -> tuple[int, ...]:
        """(rows, heads, length, head size) of the cache input `name`; a state of a fixed size has no length.

        Graphs straight from the genai builder only name sizes that are in genai_config.json.
        """
        shape = self.inputs[name].shape
        if all(isinstance(size, int) for size in shape[1:]):
            return rows, *(int(size) for size in shape[1:] if size is not None)
        heads, size = (self._size(shape[axis], key) for axis, key in (_HEADS, _HEAD_SIZE))
        return rows, heads, length, size

    def _size(self, size: int | str | None, key: str) -> int:
        if isinstance(size, int):
            return size
        config = self.path.with_name("genai_config.json") if self.path else None
        if config is None or not config.is_file():
            raise InputError(f"the cache has the symbolic size {size!r}", where=self.path, expected="a number")
        return int(json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"][key])


def read_as(output: str) -> str:
    """The name by which the next run reads an output: present… as past…, states of an encoder."""
    if output in ("last_hidden_state", "hidden_states"):
        return STATES
    if output.endswith((".conv", ".recurrent")):  # as the genai builder names states
        return output.replace("present.", "past.")
    return output.replace("present.", "past_key_values.").replace("present_", "past_")


def _of_value(value: "ir.Value") -> GraphValue:
    name = value.dtype.name.lower() if value.dtype is not None else "undefined"
    dims = value.shape if value.shape is not None else ()
    return GraphValue(str(value.name), f"tensor({name})", tuple(getattr(d, "value", d) for d in dims))
