"""Exporting a Hugging Face folder to ONNX: one engine a kind of model, checked before and after."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from lora_export import files
from lora_export.checkpoint import refuse_code
from lora_export.contracts import ExportResult, ModelKind, Precision, Progress
from lora_export.documents import Kind, check, check_texts
from lora_export.errors import CheckpointError, ExportError, InputError
from lora_export.onnx_export.checks import check_model, count_nodes
from lora_export.onnx_export.engines import architecture_of, choose
from lora_export.onnx_export.identity import compare
from lora_export.onnx_export.job import Job

__all__ = ["RECORD", "check_model", "check_request", "compare", "export", "load_export", "model_file"]

RECORD = "export.json"
_RECORD: Kind = {"engine": str, "precision": str, "nodes": int, "seconds": float, "kind": str}


def export(
    model: Path,
    output: Path,
    *,
    precision: Precision,
    provider: str = "cpu",
    engine: str | None = None,
    adapter: Path | None = None,
    force: bool = False,
    progress: Progress,
) -> ExportResult:
    """Write `model` (a Hugging Face folder) as ONNX into the new folder `output`, all or nothing.

    precision: of the weights; provider: cpu or cuda, where the graph is to run; adapter: a LoRA folder that
    stays unmerged in the graph. Raises CheckpointError or ExportError before any work if it cannot be done.
    """
    started = time.monotonic()
    config = _read_config(model)
    chosen = choose(config, engine)
    inputs = [model] if adapter is None else [model, adapter]
    with files.output_folder(output, force, inputs=inputs) as stage:
        job = Job(model, config, stage, precision, provider, adapter, progress)
        chosen.check(job)
        progress.detail(f"{architecture_of(config)} with the {chosen.name} engine, {precision} for {provider}")
        chosen.run(job)
        path = stage / "model.onnx"
        check_model(path)
        _check_loads(path, precision)
        record = {
            "engine": chosen.name,
            "precision": precision,
            "provider": provider,
            "kind": chosen.kind,
            "nodes": count_nodes(path),
            "architecture": architecture_of(config),
            "adapter": adapter is not None,
            "seconds": round(time.monotonic() - started, 3),
            "versions": _versions(),
            "source_config_sha256": files.sha256(model / "config.json"),
        }
        files.write_json(stage / RECORD, record)
    return load_export(output)


def load_export(folder: Path) -> ExportResult:
    """What an earlier export left in `folder`; InputError if there is none."""
    if not ((folder / RECORD).is_file() and (folder / "model.onnx").is_file()):
        raise InputError(
            "the folder holds no export",
            where=folder,
            expected=f"model.onnx and {RECORD}",
            next_step="lora-export export -m MODEL -o OUT",
        )
    record = files.read_json(folder / RECORD)
    check_texts(record, folder / RECORD)
    check(record, _RECORD, "the record of the export", folder / RECORD)
    return ExportResult(
        output=folder,
        engine=record["engine"],
        precision=_known(Precision, record["precision"], folder),
        nodes=record["nodes"],
        seconds=record["seconds"],
        files=_sizes(folder),
        kind=_known(ModelKind, record["kind"], folder),
    )


def _known(words: Any, found: str, folder: Path) -> Any:
    if found not in get_args(words):
        raise InputError(
            f"the record of the export says {found!r}", where=folder / RECORD, expected=", ".join(get_args(words))
        )
    return found


def check_request(config: Mapping[str, Any], precision: Precision, provider: str, engine: str | None) -> str:
    """The name of the engine that will export a model with this config.json; refuses what it cannot do.

    For a model that does not exist yet: what only its folder can tell is checked by `export`.
    """
    chosen = choose(config, engine)
    chosen.check_precision(precision, provider)
    return chosen.name


def model_file(path: Path) -> Path:
    """The .onnx file that a person means by a file or by the folder around it."""
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            "there is no ONNX model here",
            where=path,
            expected="an .onnx file, or a folder with model.onnx",
            next_step="lora-export export -m MODEL -o OUT",
        )
    return file


# --- refusals ----------------------------------------------------------------------------------------------


def _read_config(model: Path) -> dict[str, Any]:
    path = model / "config.json"
    config = files.read_json(path)
    _refuse_newer(config, path)
    for name in ("config.json", "tokenizer_config.json"):
        if (model / name).is_file():
            refuse_code(files.read_json(model / name), model / name)
    if config.get("quantization_config"):
        raise CheckpointError(
            "config.json still has a quantization_config: these are no merged weights",
            where=path,
            expected="a merged folder in fp32, fp16 or bf16",
            next_step="lora-export merge -b BASE -a ADAPTER -o OUT, then export OUT",
        )
    if not any(model.glob("*.safetensors")):
        raise CheckpointError(
            "the folder holds no weights as safetensors",
            where=model,
            expected="model.safetensors, or shards with an index; a .bin is a pickle, which can execute code",
        )
    return config


def _refuse_newer(config: Mapping[str, Any], path: Path) -> None:
    """A newer major renames keys, and an older reader falls back to defaults without a word."""
    from importlib.metadata import version

    installed = version("transformers")
    saved = str(config.get("transformers_version") or "0")
    major = saved.split(".")[0]
    if major.isdigit() and int(major) > int(installed.split(".")[0]):
        raise CheckpointError(
            f"config.json was saved by transformers {saved}; {installed} is installed and may misread it",
            where=path,
            expected=f"a config saved by transformers {installed.split('.')[0]} or older",
            next_step=f"pip install 'transformers>={major}'",
        )


# --- after the engine --------------------------------------------------------------------------------------


def _check_loads(path: Path, precision: Precision) -> None:
    """Open the graph once without optimizing it: engines have written graphs that no session accepts."""
    import onnxruntime as ort

    from lora_export.runtime import open_session, session_options

    if precision == "bf16":
        return  # loads on CUDA only, and an export may be made without one
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        open_session(path, "cpu", options=options)
    except Exception as error:
        raise ExportError(
            f"the engine wrote a graph that does not load: {error}", expected="a graph that opens"
        ) from error


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("onnxruntime-genai-cuda", "onnxruntime-genai", "onnx", "torch", "transformers"):
        try:
            found[name.removesuffix("-cuda").replace("-", "_")] = version(name)
        except PackageNotFoundError:
            continue
    return found
