"""MLmodel and the environments beside it, as MLflow reads them.

MLflow imports the module that MLmodel names, with the arguments that it gives, and installs what the environments
name. So all of them are on lists here, and a file is refused unless it is spelled as `as_text` spells it: YAML has
tags, anchors and doubled keys, which readers take differently.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from lora_export.allowed.fields import FLAG, LIMIT, WHOLE, WORD, Rule, Value, check, one_of, read
from lora_export.errors import InputError
from lora_export.storage import sealed

NAME, REQUIREMENTS, PYTHON, CONDA = "MLmodel", "requirements.txt", "python_env.yaml", "conda.yaml"
EXAMPLE, SENT = "input_example.json", "serving_input_example.json"
FILES = (NAME, REQUIREMENTS, PYTHON, CONDA, EXAMPLE, SENT)
CODE, MODULE = "code", "lora_export_served_"  # followed by 8 digits of the hash of its text
INSTALLED = ("jinja2", "mlflow", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tokenizers")
PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
TASKS = (
    "text-generation", "text2text-generation", "feature-extraction", "text-classification", "token-classification",
)  # fmt: skip
_VERSION = r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?"


def _matching(pattern: str, expected: str) -> Value:
    return Value(expected, lambda v: isinstance(v, str) and re.fullmatch(pattern, v, re.ASCII) is not None)


_NUMBERED = _matching(_VERSION, "a version")
_PIN = _matching(rf"({'|'.join(INSTALLED)})=={_VERSION}", f"NAME==VERSION, of {', '.join(INSTALLED)}")
_ANY_TEXT = Value("a text", lambda v: isinstance(v, str))
_FLAVORS: Rule = {
    "onnx": {"data": one_of("model.onnx"), "onnx_version": _NUMBERED, "providers": [one_of(*PROVIDERS)]},
    "python_function": {
        "code": one_of(CODE),
        "config": {"longest": WHOLE, "providers": [one_of(*PROVIDERS)], "task": one_of(*TASKS)},
        "env": {"conda": one_of(CONDA), "virtualenv": one_of(PYTHON)},
        "loader_module": _matching(MODULE + "[0-9a-f]{8}", f"{MODULE}HASH, the code of lora-export"),
        "python_version": _NUMBERED,
        "streamable": one_of(False),
    },
}
_PROPERTY: Rule = {"type": WORD, "required": FLAG}
_ITEMS: Rule = {"type": WORD, "items": {"type": WORD}, "properties": {str: _PROPERTY}}
_COLUMN: Rule = {"type": WORD, "name": WORD, "required": FLAG, "items": _ITEMS, "values": {"type": WORD}}
_PARAMETER: Rule = {
    "name": WORD, "type": WORD, "shape": one_of(None),
    "default": Value("a number, or null", lambda v: v is None or (isinstance(v, int | float) and v == v)),
}  # fmt: skip


def _written(rule: Rule) -> Value:
    """A JSON document as a string, as MLmodel has signatures."""

    def holds(value: Any) -> bool:
        try:
            check(json.loads(value), rule, NAME, Path(NAME))
        except (InputError, TypeError, ValueError, RecursionError):
            return False
        return True

    return Value("columns or parameters in MLflow's JSON", holds)


_MODEL: Rule = {
    "flavors": _FLAVORS,
    "is_signature_from_type_hint": one_of(False),
    "metadata": {"lora_export_version": WORD, "task": one_of(*TASKS)},
    "mlflow_version": _NUMBERED,
    "model_size_bytes": Value("a number of bytes", lambda v: isinstance(v, int) and v >= 0),
    "model_uuid": _matching("[0-9a-f]{32}", "32 digits"),
    "saved_input_example_info": {
        "artifact_path": one_of(EXAMPLE), "pandas_orient": one_of("split"), "params": one_of("true"),
        "serving_input_path": one_of(SENT), "type": one_of("dataframe"),
    },
    "signature": {
        "inputs": _written([_COLUMN]),
        "outputs": _written([_COLUMN]),
        "params": (one_of(None), _written([_PARAMETER])),
    },
    "type_hint_from_example": one_of(False),
    "utc_time_created": _matching(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{6})?", "a time"),
}  # fmt: skip
_BUILDS = _matching("pip|setuptools|wheel", "pip, setuptools or wheel")
_PYTHON: Rule = {
    "python": _NUMBERED,
    "build_dependencies": [_BUILDS],
    "dependencies": [one_of(f"-r {REQUIREMENTS}")],
}
_CONDA: Rule = {
    "channels": [one_of("conda-forge")],
    "dependencies": [(_matching(rf"python={_VERSION}|pip", "python=VERSION or pip"), {"pip": [_PIN]})],
    "name": one_of("mlflow-env"),
}
_TABLE: Rule = {"columns": [WORD], "data": [[_ANY_TEXT]]}
_PARAMS: Rule = {"max_tokens": WHOLE}
_RULES: dict[str, Rule] = {
    NAME: _MODEL,
    PYTHON: _PYTHON,
    CONDA: _CONDA,
    EXAMPLE: _TABLE | {"inputs": _TABLE, "params": _PARAMS},
    SENT: {"dataframe_split": _TABLE, "params": _PARAMS},
}


def as_text(document: dict[str, Any]) -> str:
    """YAML with sorted keys in block style."""
    return str(yaml.safe_dump(document, allow_unicode=True, width=2**20))


def check_file(path: Path) -> None:
    """InputError unless everything in one of FILES is on the list."""
    if path.name == REQUIREMENTS:
        for line in _text_of(path).splitlines():
            check({"line": line}, {"line": _PIN}, path.name, path)
        return
    document = read(path) if path.suffix == ".json" else read_yaml(path)
    check(document, _RULES[path.name], path.name, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The document. InputError unless it is spelled as `as_text` spells it."""
    text = _text_of(path)
    try:
        document = yaml.safe_load(text)
        spelled = isinstance(document, dict) and as_text(document) == text
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        spelled = False
    if not spelled:
        raise InputError(
            f"{path.name} is not spelled as lora-export spells it",
            where=path,
            expected="YAML in block style, with each key once and in order, and without tags, anchors and comments",
            next_step="create the package again with lora-export",
        )
    return dict(document)


def _text_of(path: Path) -> str:
    sealed.refuse_outward_link(path)
    if path.stat().st_size > LIMIT:
        raise InputError(f"a configuration of more than {LIMIT} bytes", where=path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("the file is not UTF-8", where=path) from None
