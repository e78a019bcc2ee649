"""Graphs under ONNX Runtime, with a cache that stays where the graph runs."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray[Any, Any]
_LOG = logging.getLogger(__name__)
_TYPES = {"int64": np.int64, "int32": np.int32, "float": np.float32, "float16": np.float16, "bool": np.bool_}
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class Graph:
    """One graph. Several threads may run it at once."""

    def __init__(self, path: Path, providers: Sequence[str]) -> None:
        present = onnxruntime.get_available_providers()
        usable = [p for p in providers if p in present] or [_CPU]
        self.session = onnxruntime.InferenceSession(str(path), providers=usable)
        if (first := self.session.get_providers()[0]) != providers[0]:
            _LOG.warning("%s does not work here, so the model runs on %s", providers[0], first)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.device = "cuda" if self.session.get_providers()[0] == _CUDA else "cpu"
        # Inputs that hold what was read so far → the outputs that take their place.
        self.cache = {n: _present(n) for n in self.inputs if n.startswith("past_")}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Name → output, in the graph's order. Feeds that are no inputs of the graph are left out."""
        given = {n: np.asarray(v, self._type(n)) for n, v in feeds.items() if n in self.inputs}
        return dict(zip(self.outputs, self.session.run(self.outputs, given), strict=True))

    def step(self, feeds: Mapping[str, Any], cache: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """The logits (vocabulary) of the last position, and the next cache."""
        binding = self.session.io_binding()
        for name, value in feeds.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value, self._type(name)))
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self.device)
        self.session.run_with_iobinding(binding)
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        logits: Array = values["logits"].numpy()[0, -1]
        return logits, {past: values[present] for past, present in self.cache.items()}

    def empty_cache(self) -> dict[str, Any]:
        """Of a batch of one, before the first step."""
        empty = {}
        for name in self.cache:
            axes = enumerate(self.inputs[name].shape)
            zeros = np.zeros([1 if i == 0 else n if isinstance(n, int) else 0 for i, n in axes], self._type(name))
            empty[name] = onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self.device)
        return empty

    def _type(self, name: str) -> Any:
        return _TYPES[self.inputs[name].type.removeprefix("tensor(").removesuffix(")")]


def _present(past: str) -> str:
    return past.replace("past_key_values", "present").replace("past_", "present_")
