"""config.pbtxt of a model repository, as the Triton Inference Server would read it.

Left out of the lists, and so refused: other backends, which are shared libraries or programs; `runtime`,
`model_operations` and parameters such as EXECUTION_ENV_PATH, all of which name code to load. The Python backend
runs the file that default_model_filename names, so only its default is allowed: model.py, which `verify` compares
with this project's.
"""

from pathlib import Path
from typing import Any

from lora_export.allowed.fields import DIGITS, FILE, FLAG, LIMIT, WHOLE, WORD, Rule, Value, check, one_of
from lora_export.errors import InputError
from lora_export.storage import sealed

NAME = "config.pbtxt"
_DEEPEST = 16
_SHAPED: Rule = {"name": [WORD], "data_type": [WORD], "dims": [WHOLE], "optional": [FLAG]}
_SENT: Rule = {"data_type": [WORD], "dims": [WHOLE], "zero_data": [FLAG], "input_data_file": [FILE]}
_COMMON: Rule = {
    "name": [WORD],
    "max_batch_size": [WHOLE],
    "input": [_SHAPED],
    "output": [_SHAPED],
    "instance_group": [{"count": [WHOLE], "kind": [one_of("KIND_CPU", "KIND_GPU")]}],
    "dynamic_batching": [{"max_queue_delay_microseconds": [WHOLE]}],
    "model_warmup": [
        {"name": [WORD], "batch_size": [WHOLE], "inputs": [{"key": [WORD], "value": [_SENT]}]},
    ],
}
_FOLDER = Value("the plain name of a model beside it", lambda v: isinstance(v, str) and sealed.plain_name(v))
_NUMBERS = Value(
    "digits and spaces",
    lambda v: isinstance(v, str) and v.isascii() and v.replace(" ", "0").isdigit() and len(v) < 200,
)
_CONFIGS: dict[str, Rule] = {
    "onnxruntime": {
        **_COMMON,
        "backend": [one_of("onnxruntime")],
        "default_model_filename": [one_of("model.onnx")],
        "parameters": [
            {
                "key": [one_of("arena_extend_strategy", "cudnn_conv_algo_search")],
                "value": [{"string_value": [DIGITS]}],
            }
        ],
    },
    "python": {
        **_COMMON,
        "backend": [one_of("python")],
        "model_transaction_policy": [{"decoupled": [FLAG]}],
        "parameters": [
            {
                "key": [one_of("graph", "end_tokens", "context_length")],
                "value": [{"string_value": [(_FOLDER, _NUMBERS)]}],
            }
        ],
    },
}


def check_config(path: Path) -> tuple[str, str]:
    """The model's name and its backend. InputError unless every field and value is on the list of the backend."""
    sealed.refuse_outward_link(path)
    if path.stat().st_size > LIMIT:
        raise InputError(f"a configuration of more than {LIMIT} bytes", where=path)
    fields = _parsed(path)
    backend = (fields.get("backend") or [""])[0]
    check(
        fields, _CONFIGS.get(backend if isinstance(backend, str) else "", _CONFIGS["onnxruntime"]), path.name, path
    )
    for field in ("name", "backend"):
        if len(fields.get(field, [])) != 1:
            raise InputError(
                f"{path.name} sets {field} {len(fields.get(field, []))} times", where=path, expected="once"
            )
    return str(fields["name"][0]), str(backend)


def _parsed(path: Path) -> dict[str, list[Any]]:
    """The fields of the text format, each a list, parsed without Triton's own classes."""
    from google.protobuf import text_format

    try:
        tokens = text_format.Tokenizer(path.read_text(encoding="utf-8").splitlines())
        return _message(tokens, "", 0)
    except (text_format.ParseError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"this is not protobuf's text format: {error}", where=path) from None


def _message(tokens: Any, end: str, depth: int) -> dict[str, list[Any]]:
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} levels")
    fields: dict[str, list[Any]] = {}
    while not (tokens.AtEnd() if not end else tokens.TryConsume(end)):
        values = fields.setdefault(tokens.ConsumeIdentifier(), [])
        tokens.TryConsume(":")
        if tokens.TryConsume("["):
            while not tokens.TryConsume("]"):
                values.append(_value(tokens, depth))
                tokens.TryConsume(",")
        else:
            values.append(_value(tokens, depth))
        tokens.TryConsume(",") or tokens.TryConsume(";")
    return fields


def _value(tokens: Any, depth: int) -> Any:
    if tokens.TryConsume("{"):
        return _message(tokens, "}", depth + 1)
    if tokens.token[:1] in ('"', "'"):
        return tokens.ConsumeString()
    if tokens.token in ("true", "false"):
        return tokens.ConsumeBool()
    if tokens.token[:1].isdigit() or tokens.token[:1] == "-":
        return tokens.ConsumeInteger()
    return tokens.ConsumeIdentifier()
