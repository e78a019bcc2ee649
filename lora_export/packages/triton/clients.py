"""Programs that ask the models of a repository, by the server or by ONNX Runtime instead of it."""

from collections.abc import Mapping
from typing import Any

from lora_export.packages.job import PackageFacts
from lora_export.packages.programs import NUMBERS, TOKENS, prompt_of
from lora_export.packages.tasks import PackageTask


def model_name(name: str, part: str) -> str:
    """Of one graph. A model of a single graph has the plain name."""
    return name if part == "model" else f"{name}-{part}"


def parts(task: PackageTask) -> tuple[str, ...]:
    """The graphs that the programs ask."""
    if task.generates and task.name != "text-generation":
        return ("encoder_model", "decoder_model_merged")
    return ("model",)


SERVER = """import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype
client = triton.InferenceServerClient("localhost:8001")
def infer(model, feeds):
    sent = [triton.InferInput(n, v.shape, np_to_triton_dtype(v.dtype)) for n, v in feeds.items()]
    for tensor, value in zip(sent, feeds.values()):
        tensor.set_data_from_numpy(value)
    answer = client.infer(model, sent)
    return {o.name: answer.as_numpy(o.name) for o in answer.get_response().outputs}"""

SESSION = """import functools, onnxruntime
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

TEXT_NOTES = """`{name}` takes and gives text; its tokenizer runs in the server. The prompt is taken as it is: if
the model has a chat template, apply it before you send the prompt.

```bash
curl -s localhost:8000/v2/models/{name}/generate -d '{{"text_input": "Once upon", "max_tokens": 32}}'
curl -sN localhost:8000/v2/models/{name}/generate_stream \\
  -d '{{"text_input": "Once upon", "max_tokens": 32, "stream": true}}'
```

The text is the likeliest one, of at most 16 tokens, unless a request says `max_tokens`, `temperature`, `top_k`,
`top_p` or `seed`. `text_output` has the new text alone, without the prompt. Texts take turns, a token at a time; a
client that goes away ends its own. The graph is that of the model beside it: keep both in one repository on a disk.
"""

_INPUTS = {
    "text": 'reader({prompt}, return_tensors="np")',
    "audio": 'reader(numpy.zeros(16000, "float32"), sampling_rate=16000, return_tensors="np")',
    "image": 'reader(images=numpy.zeros((3, 224, 224)), return_tensors="np")',
    "video": 'reader(list(numpy.zeros((16, 3, 224, 224))), return_tensors="np")',
    "both": 'reader(text=[{prompt}], images=numpy.zeros((3, 224, 224)), return_tensors="np")',
    "multiple-choice": '{{n: v[None] for n, v in reader(2 * [{prompt}], return_tensors="np").items()}}',
}


def program(facts: PackageFacts, folder: str, infer: str) -> str:
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
        encoder=repr(model_name(facts.name, "encoder_model")),
        decoder=repr(model_name(facts.name, "decoder_model_merged")),
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
