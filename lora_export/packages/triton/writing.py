"""The model that takes and gives text, beside the graph of a decoder: its config.pbtxt, tokenizer and warm-up.

It has no graph of its own: it opens that of the model beside it. Its tensors have the names that clients of the
generate endpoint know from Triton's vLLM and TensorRT-LLM backends.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export.errors import InputError
from lora_export.packages.job import PackageFacts, PackageJob
from lora_export.packages.triton import config

SUFFIX = "-generate"
TOKENIZER = "tokenizer.json"
# Name → type, whether it may be left out. model.py says what is taken in its place.
_INPUTS = {
    "text_input": ("TYPE_STRING", False), "max_tokens": ("TYPE_INT32", True), "stream": ("TYPE_BOOL", True),
    "temperature": ("TYPE_FP32", True), "top_k": ("TYPE_INT32", True), "top_p": ("TYPE_FP32", True),
    "seed": ("TYPE_INT64", True),
}  # fmt: skip
_WARM_UP = "."  # a text of which every tokenizer makes a token
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
_INSTEAD = "--backend onnxruntime, and the tokenizer in the client"


def is_offered(facts: PackageFacts) -> bool:
    """Whether a package has such a model: a decoder's for servers without the onnxruntime backend."""
    return facts.backend == config.PYTHON and facts.task.name == "text-generation"


def lay(job: PackageJob, model: ir.Model, generation: Mapping[str, Any]) -> None:
    """Write its folder into the stage, whose root has the tokenizer already. generation: generation_config.json.

    InputError for a decoder that it cannot run.
    """
    _refuse_states(model)
    home = job.stage / f"{job.facts.name}{SUFFIX}"
    (home / "1").mkdir(parents=True)
    (home / "warmup").mkdir()
    (home / "1" / TOKENIZER).write_text(_tokenizer(job.stage), encoding="utf-8")
    made = _configured(job.facts, generation)
    (home / "config.pbtxt").write_text(config.as_text(made), encoding="utf-8")
    text = _WARM_UP.encode()
    (home / "warmup" / "text_input").write_bytes(len(text).to_bytes(4, "little") + text)


def _configured(facts: PackageFacts, generation: Mapping[str, Any]) -> Any:
    pb = config.classes()
    made = pb.ModelConfig(name=f"{facts.name}{SUFFIX}", backend=config.PYTHON)
    made.model_transaction_policy.decoupled = True
    for name, (kind, optional) in _INPUTS.items():
        made.input.add(name=name, data_type=pb.DataType.Value(kind), dims=[1], optional=optional)
    made.output.add(name="text_output", data_type=pb.DataType.Value("TYPE_STRING"), dims=[1])
    config.place(pb, made, facts.providers[0])
    ends = generation.get("eos_token_id", facts.config.get("eos_token_id"))
    length = next((facts.config[n] for n in _LENGTHS if isinstance(facts.config.get(n), int)), None)
    parameters = {
        "graph": facts.name,
        "end_tokens": " ".join(
            str(end) for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)
        ),
        "context_length": str(length or ""),
    }
    for key, value in parameters.items():
        if value:
            made.parameters[key].string_value = value
    warm = made.model_warmup.add(name="first request", batch_size=1)
    sent = warm.inputs["text_input"]
    sent.MergeFrom(type(sent)(data_type=pb.DataType.Value("TYPE_STRING"), dims=[1], input_data_file="text_input"))
    return made


def _tokenizer(stage: Path) -> str:
    """tokenizer.json of what transformers makes of the package's files, so that the server has its tokens."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(stage, local_files_only=True)
    except Exception as error:  # what tokenizers raises has no other base
        raise InputError(
            f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}", where=stage, next_step=_INSTEAD
        ) from None
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} runs in transformers alone",
            expected=f"a tokenizer that has a {TOKENIZER}, for the server to run",
            next_step=_INSTEAD,
        )
    made = tokenizer.backend_tokenizer
    made.no_padding()
    made.no_truncation()
    return str(made.to_str(pretty=True))


def _refuse_states(model: ir.Model) -> None:
    """InputError for a graph that is not continued by tokens and its own states."""
    graph = model.graph
    inputs = {str(v.name): v for v in graph.inputs if v.name not in graph.initializers}
    known = {"input_ids", "attention_mask", "position_ids"}
    other = [name for name in inputs if name not in known and not name.startswith("past")]
    unsized = [
        name
        for name, value in inputs.items()
        if name.startswith("past")
        for size in config.sizes(value)
        if not (isinstance(size, int) or "batch" in size or "past" in size)
    ]
    if other or unsized or "logits" not in {v.name for v in graph.outputs}:
        raise InputError(
            f"the graph takes {', '.join(other or unsized)}, which no text says"
            if other or unsized
            else "no logits",
            expected="a decoder that takes tokens and a cache",
            next_step=_INSTEAD,
        )
