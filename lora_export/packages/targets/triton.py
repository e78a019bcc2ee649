"""A model repository for the Triton Inference Server: NAME/config.pbtxt and NAME/1/model.onnx/model.onnx.

config.pbtxt is built with Triton's own protobuf classes, which quote every name correctly.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from lora_export.errors import ExportError, InputError
from lora_export.packages import companions, graphs
from lora_export.packages.interpreters import Python
from lora_export.packages.job import RUNS_OWN, PackageFacts, PackageJob, PackageTarget, Run, Snippet, Variant
from lora_export.packages.programs import NUMBERS, TOKENS, prompt_of
from lora_export.packages.targets import hub_graphs

if TYPE_CHECKING:
    import numpy as np

LARGEST_BATCH = 8
QUEUE_MICROSECONDS = 1000  # that a request waits for others to batch with
_BATCHED = (["batch"], ["batch_size"])
_WARM_LENGTH, _WARM_PAST = 8, 1
_TYPES = {
    "FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16", "DOUBLE": "TYPE_FP64",
    "INT64": "TYPE_INT64", "INT32": "TYPE_INT32", "BOOL": "TYPE_BOOL", "UINT8": "TYPE_UINT8", "INT8": "TYPE_INT8",
}  # fmt: skip
# For ONNX Runtime's CUDA provider: as much memory as it needs, and the convolutions that it measures as fastest.
_CUDA = {"arena_extend_strategy": "1", "cudnn_conv_algo_search": "0"}
_IMAGE = "nvcr.io/nvidia/tritonserver:26.09-py3"


class TritonTarget(PackageTarget):
    name: ClassVar[str] = "triton"
    title: ClassVar[str] = "the Triton Inference Server"

    def variants(self, run: Run, names: Sequence[str]) -> tuple[Variant, ...]:
        _classes()
        return super().variants(run, names)

    def lay(self, job: PackageJob) -> None:
        export = job.exports[RUNS_OWN]
        companions.lay(job.run, job.stage)
        for part, model in hub_graphs.models(export).items():
            name = _model_name(job.facts.name, part)
            version = job.stage / name / "1" / "model.onnx"
            version.mkdir(parents=True)
            graphs.save(model, version / "model.onnx", "model.onnx.data", largest=2**62)
            config, warm = configured(name, model, job.facts.providers[0])
            (job.stage / name / "config.pbtxt").write_text(as_text(config), encoding="utf-8")
            for file, value in warm.items():
                (job.stage / name / "warmup").mkdir(exist_ok=True)
                (job.stage / name / "warmup" / file).write_bytes(value.tobytes())

    def snippet(self, facts: PackageFacts, folder: str) -> Snippet:
        setup = "pip install 'tritonclient[grpc]' transformers  # after starting the server, see below"
        return Snippet(Python(), setup, _program(facts, folder, _CLIENT))

    def check(self, facts: PackageFacts, folder: str) -> Snippet:
        """The same program with ONNX Runtime instead of the server, on the file that the server would load."""
        return Snippet(Python(), "", _program(facts, folder, _SESSION.format(folder=folder)))

    def notes(self, facts: PackageFacts) -> str:
        gpus = "--gpus all " if facts.providers[0] == "cuda" else ""
        return (
            "Start the server first, in this folder:\n\n```bash\n"
            f'docker run --rm {gpus}-p 8001:8001 -v "$PWD":/models:ro {_IMAGE} \\\n'
            "  tritonserver --model-repository=/models\n```\n\n"
            "The server takes token ids: the tokenizer runs in the client, as above. To move it into the server, "
            "put the same call into a model of Triton's Python backend, and join the two in an ensemble.\n"
        )


TARGET = TritonTarget()


def _model_name(name: str, part: str) -> str:
    """Of one graph. A model of a single graph has the plain name."""
    return name if part == "model" else f"{name}-{part}"


def _classes() -> Any:
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


def configured(name: str, model: ir.Model, provider: str) -> "tuple[Any, dict[str, np.ndarray[Any, Any]]]":
    """The ModelConfig of a graph, and the files that its warm-up reads."""
    pb = _classes()
    graph = model.graph
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    batched = all(_sizes(value)[:1] in _BATCHED for value in (*inputs, *graph.outputs))
    config = pb.ModelConfig(name=name, backend="onnxruntime", max_batch_size=LARGEST_BATCH if batched else 0)
    config.default_model_filename = "model.onnx"
    for value in inputs:
        config.input.add(name=value.name, data_type=_type(pb, value), dims=_dims(value, batched))
    for value in graph.outputs:
        config.output.add(name=value.name, data_type=_type(pb, value), dims=_dims(value, batched))
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = QUEUE_MICROSECONDS
    kind = pb.ModelInstanceGroup.KIND_GPU if provider == "cuda" else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(count=1, kind=kind)
    for key, value in (_CUDA if provider == "cuda" else {}).items():
        config.parameters[key].string_value = value
    return config, _warm_up(pb, config, inputs, batched)


def _type(pb: Any, value: ir.Value) -> int:
    name = value.dtype.name if value.dtype is not None else "UNDEFINED"
    if name not in _TYPES:
        raise ExportError(
            f"{value.name} is of type {name}, which Triton does not support", expected=", ".join(_TYPES)
        )
    return int(pb.DataType.Value(_TYPES[name]))


def _sizes(value: ir.Value) -> list[int | str]:
    """Sizes of a value's axes, or their names."""
    axes = value.shape if value.shape is not None else ()
    return [axis if isinstance(axis, int) else str(axis.value or "") for axis in axes]


def _dims(value: ir.Value, batched: bool) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in _sizes(value)[int(batched) :]] or [1]


def _warm_up(pb: Any, config: Any, inputs: Sequence[ir.Value], batched: bool) -> "dict[str, np.ndarray[Any, Any]]":
    """One request, for which the server loads kernels and memory before the first user comes. Masks are ones, which
    takes a file."""
    import numpy as np

    files: dict[str, np.ndarray[Any, Any]] = {}
    warm = config.model_warmup.add(name="first request", batch_size=1 if batched else 0)
    past = any(str(v.name).startswith("past") for v in inputs)
    for value in inputs:
        name, dims = str(value.name), [_warm_size(size, past) for size in _sizes(value)[int(batched) :]]
        sent = warm.inputs[name]
        sent.MergeFrom(type(sent)(data_type=_type(pb, value), dims=dims))
        if "mask" in name and value.dtype is not None:
            files[name] = np.ones(dims, value.dtype.numpy())
            sent.input_data_file = name
        else:
            sent.zero_data = True
    return files


def _warm_size(size: int | str, past: bool) -> int:
    if isinstance(size, int):
        return size
    if "batch" in size:
        return 1
    if "total" in size or "+" in size:
        return _WARM_LENGTH + _WARM_PAST * past
    return _WARM_PAST if "past" in size else _WARM_LENGTH


# --- the client --------------------------------------------------------------------------------------------

_CLIENT = """import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype
client = triton.InferenceServerClient("localhost:8001")
def infer(model, feeds):
    sent = [triton.InferInput(n, v.shape, np_to_triton_dtype(v.dtype)) for n, v in feeds.items()]
    for tensor, value in zip(sent, feeds.values()):
        tensor.set_data_from_numpy(value)
    answer = client.infer(model, sent)
    return {o.name: answer.as_numpy(o.name) for o in answer.get_response().outputs}"""

_SESSION = """import functools, onnxruntime
@functools.cache
def session(model):
    return onnxruntime.InferenceSession({folder!r} + f"/{{model}}/1/model.onnx/model.onnx")
def infer(model, feeds):
    names = [o.name for o in session(model).get_outputs()]
    return dict(zip(names, session(model).run(names, feeds)))"""

_ENCODER = """out = infer({name}, dict({inputs}))
print(json.dumps(next(iter(out.values())).flatten()[:{numbers}].tolist()))"""

_DECODER = """ids, said = reader({prompt})["input_ids"], []
cache = {{f"past_key_values.{{i}}.{{w}}": numpy.zeros((1, {heads}, 0, {size}), "{dtype}")
         for i in range({layers}) for w in ("key", "value")}}
step = ids
for _ in range({tokens}):
    mask = numpy.ones((1, len(ids) + len(said)), "int64")
    out = infer({name}, {{"input_ids": numpy.array([step]), "attention_mask": mask, {positions}**cache}})
    step = [int(out["logits"][0, -1].argmax())]
    if step[0] in {ends}:
        break
    said += step
    cache = {{n.replace("present", "past_key_values"): v for n, v in out.items() if n != "logits"}}
print(json.dumps(reader.decode(said, skip_special_tokens=True)))"""
_POSITIONS = '"position_ids": numpy.arange(mask.shape[1])[None, -len(step):], '

_SEQ2SEQ = """inputs, said = dict({inputs}), []
fixed = {{"encoder_hidden_states": infer({encoder}, inputs)["last_hidden_state"]{mask}}}
cache = {{f"past_key_values.{{i}}.{{p}}.{{w}}": numpy.zeros((1, {heads}, 0, {size}), "{dtype}")
         for i in range({layers}) for p in ("decoder", "encoder") for w in ("key", "value")}}
step = [{start}]
for _ in range({tokens}):
    cached = numpy.array([bool(said)])
    out = infer({decoder}, {{"input_ids": numpy.array([step]), "use_cache_branch": cached, **fixed, **cache}})
    step = [int(out["logits"][0, -1].argmax())]
    if step[0] in {ends}:
        break
    said += step
    cache = {{n.replace("present", "past_key_values"): v for n, v in out.items() if n != "logits"}}
print(json.dumps({words}.decode(said, skip_special_tokens=True)))"""
_INPUTS = {
    "text": 'reader({prompt}, return_tensors="np")',
    "audio": 'reader(numpy.zeros(16000, "float32"), sampling_rate=16000, return_tensors="np")',
    "image": 'reader(images=numpy.zeros((3, 224, 224)), return_tensors="np")',
    "video": 'reader(list(numpy.zeros((16, 3, 224, 224))), return_tensors="np")',
    "both": 'reader(text=[{prompt}], images=numpy.zeros((3, 224, 224)), return_tensors="np")',
    "multiple-choice": '{{n: v[None] for n, v in reader(2 * [{prompt}], return_tensors="np").items()}}',
}


def _program(facts: PackageFacts, folder: str, infer: str) -> str:
    reader = "AutoTokenizer" if facts.task.input == "text" else "AutoProcessor"
    head = f"import json\nimport numpy\nfrom transformers import {reader}\n{infer}"
    head += f"\nreader = {reader}.from_pretrained({folder!r})\n"
    prompt = repr(prompt_of(facts))
    kind = facts.task.name if facts.task.name in _INPUTS else facts.task.input
    inputs = _INPUTS[kind].format(prompt=prompt)
    name = repr(facts.name)
    if not facts.task.generates:
        return head + _ENCODER.format(name=name, inputs=inputs, numbers=NUMBERS)
    config = facts.config
    ends = config.get("eos_token_id")
    common = {
        "tokens": TOKENS,
        "ends": ends if isinstance(ends, list) else [ends],
        "dtype": "float16" if facts.precision == "fp16" else "float32",
        **dict(zip(("layers", "heads", "size"), _cache(config), strict=True)),
    }
    if facts.task.name == "text-generation":
        positions = _POSITIONS if str(config.get("model_type")) in _COUNTED else ""
        return head + _DECODER.format(name=name, prompt=prompt, positions=positions, **common)
    text = facts.task.input == "text"
    return head + _SEQ2SEQ.format(
        inputs=inputs,
        encoder=repr(_model_name(facts.name, "encoder_model")),
        decoder=repr(_model_name(facts.name, "decoder_model_merged")),
        mask=', "encoder_attention_mask": inputs["attention_mask"]' if text else "",
        start=int(config.get("decoder_start_token_id") or 0),
        words="reader" if text else "reader.tokenizer",
        **common,
    )


_COUNTED = frozenset({"gpt2", "gpt_neox"})  # decoders that get positions as an input instead of counting the mask


def _cache(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of a decoder's cache, by any of their names."""

    def first(*names: str) -> int:
        return next((int(config[n]) for n in names if isinstance(config.get(n), int)), 0)

    heads = first("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads")
    size = first("head_dim", "d_kv") or first("hidden_size", "n_embd", "d_model") // max(heads, 1)
    layers = first("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "num_layers")
    return layers, first("num_key_value_heads") or heads, size
