"""config.pbtxt of a model repository, as the Triton Inference Server would read it.

Left out of the list, and so refused: other backends (a Python backend runs model.py, others are shared libraries),
`runtime`, `model_operations` and parameters such as EXECUTION_ENV_PATH, all of which name code to load.
"""

from pathlib import Path
from typing import Any

from lora_export.allowed.fields import DIGITS, FILE, FLAG, LIMIT, WHOLE, WORD, Rule, check, one_of
from lora_export.errors import InputError
from lora_export.storage import sealed

NAME = "config.pbtxt"
_DEEPEST = 16
_SHAPED: Rule = {"name": [WORD], "data_type": [WORD], "dims": [WHOLE]}
_SENT: Rule = {"data_type": [WORD], "dims": [WHOLE], "zero_data": [FLAG], "input_data_file": [FILE]}
_CONFIG: Rule = {
    "name": [WORD],
    "backend": [one_of("onnxruntime")],
    "max_batch_size": [WHOLE],
    "default_model_filename": [one_of("model.onnx")],
    "input": [_SHAPED],
    "output": [_SHAPED],
    "instance_group": [{"count": [WHOLE], "kind": [one_of("KIND_CPU", "KIND_GPU")]}],
    "dynamic_batching": [{"max_queue_delay_microseconds": [WHOLE]}],
    "parameters": [
        {
            "key": [one_of("arena_extend_strategy", "cudnn_conv_algo_search")],
            "value": [{"string_value": [DIGITS]}],
        }
    ],
    "model_warmup": [
        {"name": [WORD], "batch_size": [WHOLE], "inputs": [{"key": [WORD], "value": [_SENT]}]},
    ],
}


def check_config(path: Path) -> None:
    """InputError unless every field and value is on the list."""
    sealed.refuse_outward_link(path)
    if path.stat().st_size > LIMIT:
        raise InputError(f"a configuration of more than {LIMIT} bytes", where=path)
    check(_parsed(path), _CONFIG, path.name, path)


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
