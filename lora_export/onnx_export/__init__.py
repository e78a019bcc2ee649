"""Exporting a Hugging Face folder to ONNX: one engine a kind of model, checked before and after.

An engine makes a graph and a map of its weights; `weights/layout.py` fills the data files as the map says.
The next adapter of the same base needs no engine: `graph_from` takes the graph and the map of an earlier export.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint.hashing import hash_all
from lora_export.choices import Precision
from lora_export.contracts import ExportOptions, ExportResult, Progress, QuantizationOptions, TensorSource
from lora_export.errors import InputError
from lora_export.onnx_export import records
from lora_export.onnx_export.diffusion.components import placed
from lora_export.onnx_export.engines import engine_named
from lora_export.onnx_export.engines.attempts import Produced, Prove, check_all, produce
from lora_export.onnx_export.engines.building import numbers_of, record_of
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.onnx_export.engines.protocol import ExportJob
from lora_export.onnx_export.graphs.checks import check_export, check_loads, check_model
from lora_export.onnx_export.quantize import activations, certificate
from lora_export.onnx_export.quantize.settings import blockwise, refuse_without_kernel
from lora_export.onnx_export.records import adapters_beside, load_export
from lora_export.onnx_export.refusals import read_config, refuse_unmatched, refuse_untold, refuse_unused
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights import shared_folder as shared
from lora_export.onnx_export.weights.layout import DataFiles
from lora_export.onnx_export.weights.reuse import copy_graphs, read_map, refuse_other_model
from lora_export.runtime import resolve_provider
from lora_export.storage import disk, files, sealed

RECORD = records.NAME
__all__ = [
    "RECORD",
    "adapters_beside",
    "check_export",
    "check_model",
    "check_request",
    "export",
    "load_export",
    "model_files",
    "reweight",
    "share",
    "tensor_hashes",
]


def export(
    model: Path,
    output: Path,
    options: ExportOptions,
    *,
    adapter: Path | None = None,
    source: TensorSource | None = None,
    finish: Callable[[Path], Mapping[str, Any]] | None = None,
    prove: Prove | None = None,
    calibrated_on: TensorSource | None = None,
    inputs: Sequence[Path] = (),
    ready: tuple[Path, ...] = (),
    part: str = "",
    worker: Worker | None = None,
    progress: Progress,
) -> ExportResult:
    """Write `model` (a Hugging Face folder) as ONNX into the new folder `output`, all or nothing.

    adapter: a LoRA folder that stays unmerged in the graph; source: where the numbers come from, if not from the
    files of `model`; finish: what is done to the folder before it is checked, and what it adds to the record;
    prove: holds the graphs of a job against PyTorch, or raises ExportError (it is told whether `source` has the
    numbers), and then the next engine that takes the model is tried; calibrated_on: the numbers of the model that
    reads calibration texts, if not these; inputs: other folders that `output` must not touch; ready: other exports
    of the same numbers, with the same statistics, from which is copied what they have alike; part: the place of a
    model in its pipeline, which decides its graph; worker: the process to make it in, a new one if None. Raises
    CheckpointError or ExportError before any work if it cannot be done.
    """
    started = time.monotonic()
    config = placed(read_config(model, adapter), part)
    provider = resolve_provider("auto") if options.provider == "auto" else options.provider
    precision, how = options.precision, options.quantization
    refuse_untold(how, model)
    engine = engine_named(check_request(config, precision, provider, options.engine, how))
    integers = how.activations != "float"
    quantized = None if integers else blockwise(precision, provider, how, engine.generates(config))
    read = [model, *inputs, *([adapter] if adapter else [])]
    with files.output_folder(output, options.force, inputs=read) as stage, _running(worker) as process:
        job = ExportJob(
            model, config, stage, precision, provider, adapter, progress, process, options.optimize, quantized,
            None if integers else how.calibration, calibrated_on, ready,
        )  # fmt: skip
        produced = produce(job, options.engine, source, prove, integers)
        record = replace(_finished(produced, how, finish), part=part)
        records.write_record(stage, replace(record, seconds=round(time.monotonic() - started, 3)))
    return load_export(output)


def _finished(
    produced: Produced, how: QuantizationOptions, finish: Callable[[Path], Mapping[str, Any]] | None
) -> records.ExportRecord:
    """What is left to do to an export, its checks, and its record."""
    job, made = produced.job, produced.made
    stage, texts = job.output, None
    refuse_unmatched(stage, made, how)
    if how.activations != "float":
        texts = activations.quantize(stage, job.model, made, how, job.config)
    more = finish(stage) if finish else {}
    for name in made.graphs:
        check_model(stage / name)
        check_loads(stage / name, job.precision)
    return replace(
        record_of(job, made, produced.engine.name, how.activations),
        calibration=produced.calibration or texts,
        proof=produced.proof,
        tried=produced.tried,
        made_by_engine=tuple(n for n in produced.own if n != weights_map.NAME),
        graph_versions=records.versions(),
        **more,
    )


def reweight(
    earlier: Path,
    model: Path,
    output: Path,
    *,
    source: TensorSource | None = None,
    force: bool = False,
    ready: tuple[Path, ...] = (),
    progress: Progress,
) -> ExportResult:
    """Export `model` with the graphs of `earlier`, an export of the same base: only data files are written anew.

    The result is, byte for byte, what a fresh export of `model` with the options of `earlier` gives. With `force`,
    `output` may be `earlier` itself, which is replaced at the end. ready: as in `export`.
    """
    started = time.monotonic()
    record = records.read_record(earlier)
    check_export(earlier, record.graphs)
    config = placed(read_config(model), record.part)
    described = read_map(earlier, record.graphs)
    inputs = [model] if output.exists() and output.samefile(earlier) else [model, earlier]
    numbers = numbers_of(model, source, config)
    with files.output_folder(output, force, inputs=inputs) as stage:
        hashes = weights_map.read(ready[0]).hashes if ready else hash_all(numbers)
        refuse_other_model(earlier, record, config, described, hashes)
        unchanged = frozenset(n for n, h in hashes.items() if described.hashes[n] == h)
        disk.check_space(output.absolute().parent, sum(described.sizes.values()))
        progress.detail(f"{len(unchanged)} of {len(hashes)} tensors are as they were exported")
        copy_graphs(earlier, stage, record.made_by_engine)
        engine_named(record.engine).accompany(model, stage)
        calibrated = certificate.statistics_beside(earlier, described)
        if calibrated:
            sealed.copy(calibrated.path, stage / calibrated.path.name)
        data = DataFiles(
            stage, described, numbers, progress, earlier, unchanged, statistics=calibrated, ready=ready
        )
        data.write()
        certificate.write(stage, described, data.errors, (earlier, *ready))
        weights_map.write(stage, replace(described, hashes=hashes))
        digest, seconds = sealed.sha256(model / "config.json"), round(time.monotonic() - started, 3)
        proof = replace(record.proof, inherited=True) if record.proof else None
        records.write_record(stage, replace(record, seconds=seconds, source_config_sha256=digest, proof=proof))
    return load_export(output)


def share(
    earlier: Path, model: Path, root: Path, name: str, *, force: bool = False, progress: Progress
) -> ExportResult:
    """Add `model` as the adapter `name` to `root`, where all adapters share the weights of `earlier`'s base.

    `root` is made with the base in it if it is not there. What is written for an adapter is a graph and the weights
    that differ from the base's; see `shared`. Refuses what `reweight` refuses.
    """
    started = time.monotonic()
    record = records.read_record(earlier)
    check_export(earlier, record.graphs)
    shared.check_name(name, record, earlier)
    described = read_map(earlier, record.graphs)
    base = shared.Shared(earlier, described, record)
    inputs = [model] if root.exists() and root.samefile(earlier) else [model, earlier]
    config = placed(read_config(model), record.part)
    numbers = numbers_of(model, None, config)
    hashes = hash_all(numbers)
    refuse_other_model(earlier, record, config, described, hashes)
    with shared.opened(root, base, inputs) as folder:
        graph = shared.add(folder, name, base, numbers, hashes, force, progress)
        shared.warn_of_companions(model, folder, progress)
    return replace(load_export(root / graph), seconds=time.monotonic() - started)


def _running(worker: Worker | None) -> AbstractContextManager[Worker]:
    return nullcontext(worker) if worker is not None else Worker()


def check_request(
    config: Mapping[str, Any],
    precision: Precision,
    provider: str,
    engine: str | None,
    quantization: QuantizationOptions | None = None,
) -> str:
    """The name of the engine that will export a model with this config.json; refuses what it cannot do.

    For a model that does not exist yet: what only its folder can tell is checked by `export`.
    """
    refuse_without_kernel(precision)
    how = quantization or QuantizationOptions()
    chosen = check_all(config, engine, lambda each: each.check_precision(precision, provider))
    activations.check(precision, chosen.generates(config), how)
    refuse_unused(precision, how)
    if how.activations == "float":
        blockwise(precision, provider, how, chosen.generates(config))
    return chosen.name


def tensor_hashes(folder: Path) -> Mapping[str, str]:
    """Name → hash of each checkpoint tensor that an export was made of. InputError for a folder without them."""
    return weights_map.read(folder).hashes


def model_files(path: Path) -> tuple[Path, ...]:
    """The .onnx files that a person means by a file or by a folder; an encoder's first."""
    if (path / RECORD).is_file():
        return load_export(path).paths
    file = path / "model.onnx" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            "there is no ONNX model here",
            where=path,
            expected="an .onnx file, or a folder with model.onnx",
            next_step="lora-export export -m MODEL -o OUT",
        )
    return (file,)
