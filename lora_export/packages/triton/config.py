"""config.pbtxt of a graph, built with Triton's own protobuf classes, which quote every name correctly."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lora_export.errors import ExportError, InputError

if TYPE_CHECKING:
    import numpy as np

PYTHON = "python"  # the backend for servers without onnxruntime
LARGEST_BATCH = 8
QUEUE_MICROSECONDS = 1000  # that a request waits for others to batch with
_BATCHED = (["batch"], ["batch_size"])
_WARM_LENGTH, _WARM_PAST = 8, 1
_ENCODED = ("encoder_hidden_states", "encoder_attention_mask")
_TYPES = {
    "FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "DOUBLE": "TYPE_FP64",
    "INT64": "TYPE_INT64", "INT32": "TYPE_INT32", "BOOL": "TYPE_BOOL", "UINT8": "TYPE_UINT8", "INT8": "TYPE_INT8",
}  # fmt: skip
# For ONNX Runtime's CUDA provider: as much memory as it needs, and the convolutions that it measures as fastest.
_CUDA = {"arena_extend_strategy": "1", "cudnn_conv_algo_search": "0"}


def classes() -> Any:
    """tritonclient's protobuf classes. InputError where they are not installed."""
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise InputError(
            f"tritonclient, which config.pbtxt is written with, is not installed: {error}",
            expected="the extra `triton`",
            next_step="pip install 'lora-export[triton]'",
        ) from None
    return model_config_pb2


def as_text(config: Any) -> str:
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def configured(
    name: str, model: ir.Model, provider: str, backend: str, encoded: int | None = None
) -> "tuple[Any, dict[str, np.ndarray[Any, Any]]]":
    """The ModelConfig of a graph, and the files that its warm-up reads. backend: onnxruntime or python; encoded:
    how many states the encoder beside it always has, None if that is up to its input."""
    pb = classes()
    graph = model.graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    batched = all(sizes(value)[:1] in _BATCHED for value in (*inputs, *graph.outputs))
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=LARGEST_BATCH if batched else 0)
    for value in inputs:
        config.input.add(name=value.name, data_type=_type(pb, value), dims=_dims(value, batched))
    for value in graph.outputs:
        config.output.add(name=value.name, data_type=_type(pb, value), dims=_dims(value, batched))
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = QUEUE_MICROSECONDS
    place(pb, config, provider)
    if backend != PYTHON:
        config.default_model_filename = "model.onnx"
        for key, value in (_CUDA if provider == "cuda" else {}).items():
            config.parameters[key].string_value = value
    return config, _warm_up(pb, config, inputs, batched, encoded or _WARM_LENGTH)


def place(pb: Any, config: Any, provider: str) -> None:
    """One instance, where the provider runs."""
    kind = pb.ModelInstanceGroup.KIND_GPU if provider == "cuda" else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(count=1, kind=kind)


def _type(pb: Any, value: ir.Value) -> int:
    name = value.dtype.name if value.dtype is not None else "UNDEFINED"
    if name not in _TYPES:
        raise ExportError(
            f"{value.name} is of type {name}, which Triton does not support", expected=", ".join(_TYPES)
        )
    return int(pb.DataType.Value(_TYPES[name]))


def sizes(value: ir.Value) -> list[int | str]:
    """Sizes of a value's axes, or their names."""
    axes = value.shape if value.shape is not None else ()
    return [axis if isinstance(axis, int) else str(axis.value or "") for axis in axes]


def _dims(value: ir.Value, batched: bool) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in sizes(value)[int(batched) :]] or [1]


def always_encoded(models: Mapping[str, ir.Model]) -> int | None:
    """How many states an encoder among the models gives for every input, as Whisper's does; None if they vary."""
    encoder = models.get("encoder_model")
    length = sizes(encoder.graph.outputs[0])[1] if encoder is not None else None
    return length if isinstance(length, int) else None


def _warm_up(
    pb: Any, config: Any, inputs: Sequence[ir.Value], batched: bool, encoded: int
) -> "dict[str, np.ndarray[Any, Any]]":
    """One request, for which the server loads kernels and memory before the first user comes. Masks are ones, which
    takes a file. The server skips a request whose batch_size is not 1 or more, also of a model without batches."""
    import numpy as np

    files: dict[str, np.ndarray[Any, Any]] = {}
    warm = config.model_warmup.add(name="first request", batch_size=1)
    past = any(str(v.name).startswith("past") for v in inputs)
    for value in inputs:
        name = str(value.name)
        length = encoded if name in _ENCODED else _WARM_LENGTH
        dims = [_warm_size(size, past, length) for size in sizes(value)[int(batched) :]]
        sent = warm.inputs[name]
        sent.MergeFrom(type(sent)(data_type=_type(pb, value), dims=dims))
        if "mask" in name and value.dtype is not None:
            files[name] = np.ones(dims, value.dtype.numpy())
            sent.input_data_file = name
        else:
            sent.zero_data = True
    return files


def _warm_size(size: int | str, past: bool, length: int) -> int:
    if isinstance(size, int):
        return size
    if "batch" in size:
        return 1
    if "total" in size or "+" in size:
        return _WARM_LENGTH + _WARM_PAST * past
    return _WARM_PAST if "past" in size else length
