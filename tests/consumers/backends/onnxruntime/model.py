"""Triton's `onnxruntime` backend in Python, for servers that come without the real one.

As the real one: reads default_model_filename, a file or a folder with it; runs the requests that the server batched
at once; answers with the outputs that are asked for.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

_THREADS = "intra_op_thread_count"


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        name = config["default_model_filename"]
        place = Path(triton.get_model_dir()) / name
        given = {k: v["string_value"] for k, v in config["parameters"].items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(given.pop(_THREADS, 1))
        self.batched = config["max_batch_size"] > 0
        self.session = onnxruntime.InferenceSession(
            place / name if place.is_dir() else place, options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.inputs = [value.name for value in self.session.get_inputs()]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        read = [self._feeds(request) for request in requests]
        if not self.batched:
            return [self._answer(r, self.session.run(None, f)) for r, f in zip(requests, read, strict=True)]
        together = {name: np.concatenate([feeds[name] for feeds in read]) for name in self.inputs}
        ends = np.cumsum([feeds[self.inputs[0]].shape[0] for feeds in read])[:-1]
        parts = zip(*(np.split(value, ends) for value in self.session.run(None, together)), strict=True)
        return [self._answer(r, values) for r, values in zip(requests, parts, strict=True)]

    def _feeds(self, request: Any) -> dict[str, Any]:
        return {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}

    def _answer(self, request: Any, values: Sequence[Any]) -> Any:
        wanted = request.requested_output_names()
        named = zip(self.outputs, values, strict=True)
        return triton.InferenceResponse(
            [triton.Tensor(n, np.ascontiguousarray(v)) for n, v in named if n in wanted]
        )
