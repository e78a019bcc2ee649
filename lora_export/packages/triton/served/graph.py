"""A graph under Triton's Python backend: the same tensors as with its onnxruntime backend.

The requests that the server batched run at once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_session
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.batched = json.loads(args["model_config"])["max_batch_size"] > 0
        self.session = onnx_session.opened(args, Path(args["model_repository"]))
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        if self.batched and len(requests) > 1:
            return self._together(requests)
        return [self._alone(request) for request in requests]

    def _together(self, requests: Sequence[Any]) -> list[Any]:
        """The server batches requests of equal shapes alone, so rows are all that differs. If one of them fails,
        the others are run without it."""
        read = [self._feeds(request) for request in requests]
        feeds = {name: np.concatenate([one[name] for one in read]) for name in self.inputs}
        ends = np.cumsum([len(one[self.inputs[0]]) for one in read])[:-1]
        try:
            parts = [np.split(value, ends) for value in self.session.run(self.outputs, feeds)]
        except Exception:
            return [self._alone(request) for request in requests]
        return [self._answer(r, values) for r, values in zip(requests, zip(*parts, strict=True), strict=True)]

    def _alone(self, request: Any) -> Any:
        try:
            return self._answer(request, self.session.run(self.outputs, self._feeds(request)))
        except Exception as error:
            return _refusal(error)

    def _feeds(self, request: Any) -> dict[str, Any]:
        return {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}

    def _answer(self, request: Any, values: Sequence[Any]) -> Any:
        wanted = set(request.requested_output_names())
        named = zip(self.outputs, values, strict=True)
        return triton.InferenceResponse(
            [triton.Tensor(n, np.ascontiguousarray(v)) for n, v in named if n in wanted]
        )


def _refusal(error: Exception) -> Any:
    """The graph's own words: a request that it cannot run ends alone, and the model stays."""
    return triton.InferenceResponse(error=triton.TritonError(f"onnxruntime: {error}"))
