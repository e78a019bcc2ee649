"""What is this folder? Answered from headers and configuration files alone."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.adapters import CONFIG, AdapterFile, kinds, read_adapter, tokens
from lora_export.checkpoint import Checkpoint, open_adapter_files, open_checkpoint
from lora_export.checkpoint.adapter_files import single_file
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import Adapter, AdapterChoice, MergeOptions, TensorInfo
from lora_export.errors import InputError, LoraExportError
from lora_export.manifest import NAME as MANIFEST
from lora_export.manifest import is_run
from lora_export.manifest import parse as parse_manifest
from lora_export.packages import contents
from lora_export.packages.contents import is_package
from lora_export.quantization import describe, method_here, settings_of, with_settings
from lora_export.report import load as report_of
from lora_export.storage.sealed import read_json
from lora_export.workflows.fleet import joined
from lora_export.workflows.fleet.verifying import is_root
from lora_export.workflows.parameters import parameters, parameters_of_base
from lora_export.workflows.pipelines.inspecting import fit, inspect_file, inspect_pipeline

if TYPE_CHECKING:
    from lora_export.merging.planning.plan import MergePlan

# Kinds with a rank: which dimension of an update's first tensor it is.
_RANK_AXIS = {
    "lora": 0, "lora_embedding": 0, "lora_convolution": 0, "dora": 0, "adalora": 0, "miss": 0, "miss_bat": 1,
    "hra": 1, "vblora": 0, "randlora": 0, "delora": 0, "gralora": 2, "hira": 0, "hira_embedding": 0,
    "hira_convolution": 0, "tinylora": 0,
}  # fmt: skip
_SCALINGS = {
    "adalora": "alpha/(initial rank + 1e-5)",
    "gralora": "alpha/(rank + hybrid rank)",
    "randlora": "alpha/rank",
}


def inspect_folder(folder: Path, base: Path | None = None) -> dict[str, Any]:
    """`kind` (package, run, fleet, adapter, onnx, base), and what a person wants to know about that kind."""
    if folder.is_file():
        return inspect_file(folder, base)
    if not folder.is_dir():
        raise InputError("no such folder", where=folder)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder, base)
    if is_package(folder):
        return _package(folder)
    if is_run(folder):
        return _run(folder)
    if any((folder / name).is_file() for name in ("export.json", "model.onnx")):
        return _onnx(folder)
    if is_root(str(folder)):
        return joined.described(folder)
    if is_pipeline(folder):
        return inspect_pipeline(folder)
    if (folder / "config.json").is_file():
        return _base(open_checkpoint(folder))
    if (single := single_file(folder)) is not None:
        return inspect_file(single, base)
    raise InputError(
        "not a base, adapter, ONNX export, run, package or fleet",
        where=folder,
        expected="a folder with config.json, adapter_config.json, model.onnx or manifest.json",
    )


def _base(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    quantization = settings_of(with_settings(checkpoint.folder, config))
    return {
        "kind": "base",
        "architecture": (config.get("architectures") or [None])[0],
        "model_type": config.get("model_type"),
        "parameters": parameters_of_base(checkpoint),
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "shards": len({t.file for t in checkpoint.tensors.values()}),
        "quantization": describe(quantization) if quantization else method_here(checkpoint, config),
        "tied_embeddings": config.get("tie_word_embeddings"),
        "vocabulary": config.get("vocab_size"),
        "saved_by_transformers": config.get("transformers_version"),
        "merged_by_lora_export": (checkpoint.folder / "lora_export_certificate.json").is_file(),
    }


def _adapter(folder: Path, base: Path | None) -> dict[str, Any]:
    config, tensors = open_adapter_files(folder)
    document: dict[str, Any] = {"kind": "adapter", "peft_type": config.get("peft_type")}
    of_images = base is not None and is_pipeline(base)
    planned = _planned(base, folder) if base and not of_images else None
    try:
        adapter = read_adapter(AdapterFile(tensors, config, folder / CONFIG))
    except LoraExportError as error:
        if planned is None or isinstance(planned, LoraExportError):
            return document | {"mergeable": False, "reason": error.found}
        adapter = planned.adapters[0]  # its layers depend on the base
    config = dict(adapter.config)
    document |= {
        "mergeable": True,
        "summary": _words(adapter, adapter.tensors),
        "kinds": dict(Counter(u.kind for u in adapter.updates)),
        "base_model": config.get("base_model_name_or_path"),
        "base_revision": config.get("revision"),
        "rank": config.get("init_r") if adapter.kind == "adalora" else config.get("r"),
        "alpha": next((config[k] for k in ("lora_alpha", "alpha", "randlora_alpha") if k in config), None),
        "scaling": _scaling(adapter),
        "ranks": _ranks(adapter, adapter.tensors),
        "targets": _targets(adapter),
        "replaces": [u.target for u in adapter.updates if u.replaces],
        "parameters": parameters(tensors.tensors),
        "dtypes": dict(Counter(t.dtype for t in tensors.tensors.values())),
        "tensors": len(tensors.tensors),
        "bytes": sum(t.nbytes for t in tensors.tensors.values()),
        "saved_by_peft": config.get("peft_version"),
    }
    if base is not None and of_images:
        return document | {k: v for k, v in fit(base, folder).items() if k != "kinds"}
    if isinstance(planned, LoraExportError):
        where = f" ({planned.tensor})" if planned.tensor else ""
        return document | {"fits_base": False, "why_not": f"{planned.found}{where}"}
    if planned is not None:
        document |= {"fits_base": True, "would_change": planned.counts}
        document |= {"output_model": planned.model.words} if planned.model else {}
    return document


def _planned(base: Path, adapter: Path) -> "MergePlan | LoraExportError":
    from lora_export.merging import plan

    try:
        return plan(base, [AdapterChoice(adapter)], MergeOptions())
    except LoraExportError as error:
        return error


def _words(adapter: Adapter, tensors: Mapping[str, TensorInfo]) -> str:
    """The adapter in sentences: kind, ranks, targets, base, and the effect of merging."""
    config = adapter.config
    names = kinds(adapter.kind.upper())
    changes = {u.kind for u in adapter.updates}
    kind = next((k for k in names if k.NAME.lower() in changes), names[0] if names else tokens)
    ranks = list(_ranks(adapter, tensors))
    span = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 3 else f"rank {', '.join(ranks)}"
    targets = _targets(adapter)
    layers = max(targets.values(), default=0)
    types = " and ".join(sorted({t.dtype for t in tensors.values()}))
    base = config.get("base_model_name_or_path") or "a base that it does not name"
    replaced = sum(u.replaces for u in adapter.updates)
    return " ".join(
        text
        for text in (
            f"{kind.NAME} adapter" + (f" of {span}" if ranks else ""),
            f"on {', '.join(targets)} in {layers} layers," if layers > 1 else f"on {', '.join(targets)},",
            f"{parameters(tensors):,} parameters in {types}, trained on {base}.",
            "An adapter does not record whether that base was quantized in training.",
            f"Merging changes {len({u.target for u in adapter.updates}) - replaced} weights ({kind.FORMULA})",
            f"and replaces {replaced}." if replaced else "and replaces none.",
        )
    )


def _scaling(adapter: Adapter) -> str | None:
    """The factor of the delta in words; None for kinds that have none."""
    if adapter.kind in _SCALINGS:
        return _SCALINGS[adapter.kind]
    if not any(adapter.config.get(key) is not None for key in ("lora_alpha", "alpha")):
        return None
    return "alpha/√rank" if adapter.config.get("use_rslora") else "alpha/rank"


def _ranks(adapter: Adapter, tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """rank → number of weights that have it."""
    known = (u for u in adapter.updates if u.kind in _RANK_AXIS)
    counts = Counter(tensors[u.keys[0]].shape[_RANK_AXIS[u.kind]] for u in known)
    return {str(rank): count for rank, count in sorted(counts.items())}


def _targets(adapter: Adapter) -> dict[str, int]:
    """Module → number of layers in which the adapter changes it."""
    return dict(Counter(u.target.rpartition(".")[0].rpartition(".")[2] for u in adapter.updates if not u.replaces))


def _onnx(folder: Path) -> dict[str, Any]:
    from lora_export.onnx_export import adapters_beside, check_model, load_export

    export = load_export(folder)
    for name in export.graphs:
        check_model(folder / name)
    return {
        "kind": "onnx",
        "model": export.kind,
        "task": export.task,
        "graphs": list(export.graphs),
        "engine": export.engine,
        "precision": export.precision,
        "nodes": export.nodes,
        "adapters": adapters_beside(folder),
        "files": dict(export.files),
        "runs_in": "onnxruntime-genai, ONNX Runtime"
        if (folder / "genai_config.json").is_file()
        else "ONNX Runtime",
    }


def _package(folder: Path) -> dict[str, Any]:
    manifest = contents.read(folder)
    return {
        "kind": "package",
        "target": manifest.target,
        "name": manifest.name,
        "task": manifest.task,
        "base": manifest.base.name,
        "adapters": [a.name for a in manifest.adapters],
        "precision": manifest.precision,
        "variants": list(manifest.variants),
        "latency": manifest.latency.verdict,
        "signed": (folder / contents.SIGNATURE).is_file(),
        "files": len(manifest.files),
        "bytes": sum(f.size for f in manifest.files.values()),
    }


def _run(folder: Path) -> dict[str, Any]:
    manifest, report = parse_manifest(read_json(folder / MANIFEST), folder), report_of(folder / "report")
    benchmark = report.benchmark
    return {
        "kind": "run",
        "title": report.title,
        "created": report.created,
        "status": report.status,
        "base": manifest.base.name,
        "adapters": [a.name for a in manifest.adapters],
        "precision": manifest.recorded_options.precision,
        "latency": benchmark.verdict if benchmark else None,
        "provider": benchmark.provider if benchmark else None,
        "files": len(manifest.files),
        "bytes": sum(f.size for f in manifest.files.values()),
    }
