"""MLmodel, the environments and the input examples of a package, as MLflow 3 writes them."""

import json
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

from lora_export.allowed.mlflow_model import (
    CODE,
    CONDA,
    EXAMPLE,
    NAME,
    PYTHON,
    REQUIREMENTS,
    SENT,
    as_text,
)
from lora_export.packages.job import PackageFacts, PackageJob, Run
from lora_export.packages.programs import TOKENS, prompt_of
from lora_export.storage import sealed
from lora_export.version import __version__

MLFLOW = "3.17.2"  # whose format this is, and which serves it
PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_SPACE = uuid.UUID("0c6e1f3a-6f0d-5c7e-8a44-0d7f5b6f2b11")  # of models: the same package has the same identity
_RUNTIMES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
MOST_TOKENS = 128  # of an answer, where a request does not say


Signature = Mapping[str, str | None]


def write(job: PackageJob, module: str, config: Mapping[str, Any], signature: Signature, single: bool) -> None:
    """All six documents. module: of the code; config: what it is given; single: whether there is one graph, which
    mlflow.onnx loads."""
    run, facts, stage = job.run, job.facts, job.stage
    pins = pinned(run, facts.providers[0], single)
    python = _public(run.manifest.versions["python"])
    (stage / REQUIREMENTS).write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
    builds = ["pip", "setuptools", "wheel"]
    _write(stage / PYTHON, {"python": python, "build_dependencies": builds, "dependencies": [f"-r {REQUIREMENTS}"]})
    packages = [f"python={python}", "pip", {"pip": pins}]
    _write(stage / CONDA, {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": packages})
    _write_example(stage, facts)
    flavors: dict[str, Any] = {
        "python_function": {
            "code": CODE,
            "config": dict(config),
            "env": {"conda": CONDA, "virtualenv": PYTHON},
            "loader_module": module,
            "python_version": python,
            "streamable": False,
        }
    }
    if single:
        version = _public(run.manifest.versions["onnx"])
        flavors["onnx"] = {"data": "model.onnx", "onnx_version": version, "providers": list(config["providers"])}
    document = {
        "flavors": flavors,
        "is_signature_from_type_hint": False,
        "metadata": {"lora_export_version": __version__, "task": facts.task.name},
        "mlflow_version": MLFLOW,
        "model_size_bytes": sum(sealed.sizes(stage).values()),
        "model_uuid": _identity(run, facts).hex,
        "saved_input_example_info": {
            "artifact_path": EXAMPLE,
            "pandas_orient": "split",
            "serving_input_path": SENT,
            "type": "dataframe",
        }
        | ({"params": "true"} if facts.task.generates else {}),
        "signature": dict(signature),
        "type_hint_from_example": False,
        "utc_time_created": _time(run.report.created),
    }
    _write(stage / NAME, document)


def pinned(run: Run, provider: str, single: bool) -> list[str]:
    """Requirements: ONNX Runtime as the run used it, for the provider, and what is installed here of the rest."""
    made_by = run.manifest.versions
    runtime = made_by.get("onnxruntime-gpu") or made_by["onnxruntime"]
    versions = {
        "jinja2": metadata.version("jinja2"),
        "mlflow": MLFLOW,
        "numpy": metadata.version("numpy"),
        **({"onnx": made_by["onnx"]} if single else {}),
        _RUNTIMES[provider]: runtime,
        "tokenizers": metadata.version("tokenizers"),
    }
    return [f"{name}=={_public(version)}" for name, version in versions.items()]


def signature(task: str, outputs: Sequence[str], chats: bool) -> Signature:
    """MLflow's signature: JSON in strings. outputs: of the graphs; chats: whether there is a template of chats."""
    text = {"type": "string", "required": True}
    writes = task in ("text-generation", "text2text-generation")
    inputs: list[dict[str, Any]] = [{**text, "name": "prompt" if writes else "input"}]
    if task == "text-generation" and chats:  # one of the two in each row
        turn = {"content": text, "role": text}
        items = {"type": "object", "properties": turn}
        inputs = [
            {"type": "string", "name": "prompt", "required": False},
            {"type": "array", "items": items, "name": "messages", "required": False},
        ]
    answers = {
        "feature-extraction": _EMBEDDING if "sentence_embedding" in outputs else _STATES,
        "text-classification": {"type": "map", "values": {"type": "double"}},
        "token-classification": {"type": "array", "items": {"type": "object", "properties": _TAG}},
    }
    return {
        "inputs": json.dumps(inputs),
        "outputs": json.dumps([{**answers.get(task, text), "required": True}]),
        "params": json.dumps(_PARAMETERS) if writes else None,
    }


_EMBEDDING = {"type": "array", "items": {"type": "float"}}
_STATES = {"type": "array", "items": {"type": "array", "items": {"type": "float"}}}
_TAG = {
    name: {"type": kind, "required": True}
    for name, kind in (("end", "long"), ("label", "string"), ("score", "double"), ("start", "long"))
}
_PARAMETERS = [
    {"name": name, "default": default, "shape": None, "type": kind}
    for name, default, kind in (
        ("max_tokens", MOST_TOKENS, "long"),
        ("temperature", 0.0, "double"),
        ("top_k", 0, "long"),
        ("top_p", 1.0, "double"),
        ("seed", None, "long"),
    )
]


def _write_example(stage: Path, facts: PackageFacts) -> None:
    """The sample, as MLflow keeps a table, and as its server is sent one."""
    table = {"columns": ["prompt" if facts.task.generates else "input"], "data": [[prompt_of(facts)]]}
    params = {"params": {"max_tokens": TOKENS}} if facts.task.generates else {}
    kept = {"inputs": table, **params} if params else table
    for name, document in ((EXAMPLE, kept), (SENT, {"dataframe_split": table, **params})):
        sealed.write_settings(stage / name, document)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(as_text(document), encoding="utf-8")


def _identity(run: Run, facts: PackageFacts) -> uuid.UUID:
    """The same for the same package of the same run."""
    digest = sealed.sha256(run.folder / "manifest.json")
    return uuid.uuid5(_SPACE, json.dumps([digest, facts.name, facts.precision, facts.providers, __version__]))


def _public(version: str) -> str:
    """Without what only this machine has (2.13.0+cpu)."""
    return Version(version).public


def _time(created: str) -> str:
    """The run's time as MLflow writes times. created: ISO 8601."""
    from datetime import UTC, datetime

    return str(datetime.fromisoformat(created).astimezone(UTC).replace(tzinfo=None))
