"""A process that runs decoders' graphs in ONNX Runtime or in OpenVINO and tells how long each call took.

    python tools/graph_worker.py onnxruntime|openvino THREADS NAME=MODEL.onnx …

It needs numpy and the runtime alone, so that each can be in an environment of its own. A request is a line of JSON
{"arm", "rows", "tokens", "past", "calls"} on stdin; its answer is a line with "seconds" of each call and "logits"
of the last token of the first row.
"""

import json
import sys
import time
from typing import Any

import numpy as np


def feeds_of(inputs: list[tuple[str, list[int]]], rows: int, tokens: int, past: int) -> dict[str, Any]:
    """The same numbers in every process. inputs: names and shapes, with -1 for what is free."""
    draw, made = np.random.default_rng(0), {}
    for name, shape in sorted(inputs):
        if name == "input_ids":
            made[name] = draw.integers(0, 100, (rows, tokens))
        elif name == "attention_mask":
            made[name] = np.ones((rows, past + tokens), np.int64)
        elif name == "position_ids":
            made[name] = np.tile(np.arange(past, past + tokens), (rows, 1))
        else:
            _, heads, _, size = shape
            made[name] = draw.standard_normal((rows, heads, past, size)).astype(np.float32)
    return made


class InOnnxRuntime:
    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._values = onnxruntime.OrtValue
        found = ((i.name, [d if isinstance(d, int) else -1 for d in i.shape]) for i in self._session.get_inputs())
        self.inputs = list(found)
        self._outputs = [o.name for o in self._session.get_outputs()]

    def given(self, feeds: dict[str, Any]) -> Any:
        return {name: self._values.ortvalue_from_numpy(array) for name, array in feeds.items()}

    def run(self, given: Any) -> Any:
        return self._session.run_with_ort_values(self._outputs, given)

    def logits(self, found: Any) -> Any:
        return found[self._outputs.index("logits")].numpy()


class InOpenVino:
    def __init__(self, path: str, threads: int) -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        model = openvino.Core().compile_model(path, "CPU", settings)
        self._tensor = openvino.Tensor
        shapes = ((i.any_name, i.partial_shape) for i in model.inputs)
        self.inputs = [(name, [-1 if d.is_dynamic else d.get_length() for d in shape]) for name, shape in shapes]
        self._request = model.create_infer_request()

    def given(self, feeds: dict[str, Any]) -> Any:
        return {name: self._tensor(array) for name, array in feeds.items()}

    def run(self, given: Any) -> Any:
        return self._request.infer(given, share_inputs=True, share_outputs=True)

    def logits(self, found: Any) -> Any:
        return next(array for output, array in found.items() if "logits" in output.names)


def answer(graph: Any, asked: dict[str, Any], kept: dict[tuple[Any, ...], Any]) -> dict[str, Any]:
    shape = (asked["rows"], asked["tokens"], asked["past"])
    key = (asked["arm"], *shape)
    if key not in kept:
        kept[key] = graph.given(feeds_of(graph.inputs, *shape))
    seconds, found = [], None
    for _ in range(asked["calls"]):
        started = time.perf_counter()
        found = graph.run(kept[key])
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "logits": np.array(graph.logits(found))[0, -1].tolist()}


def main() -> None:
    runtime, threads, *arms = sys.argv[1:]
    opened = {"onnxruntime": InOnnxRuntime, "openvino": InOpenVino}[runtime]
    graphs = {}
    for arm in arms:
        name, _, path = arm.partition("=")
        graphs[name] = opened(path, int(threads))
    print(json.dumps({"ready": sorted(graphs)}), flush=True)
    kept: dict[tuple[Any, ...], Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(graphs[asked["arm"]], asked, kept)), flush=True)


if __name__ == "__main__":
    main()
