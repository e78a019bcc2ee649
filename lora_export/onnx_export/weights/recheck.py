"""An export checked again: what an export of the same model would write, compared byte for byte with what is there.

The graph is built once more, which takes no weights; the data files are made again from the model's tensors as
weights-map.json says, by the writer that made them, and compared as they would be written.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint.hashing import hash_all
from lora_export.checkpoint.sentence import module_tensors, with_modules
from lora_export.contracts import ExportOptions, Finding, Findings, Progress, QuantizationOptions, TensorSource
from lora_export.errors import ExportError, LoraExportError, plain
from lora_export.onnx_export import records
from lora_export.onnx_export.diffusion.components import own_half, placed
from lora_export.onnx_export.engines import choose
from lora_export.onnx_export.engines.building import record_of
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.onnx_export.engines.protocol import Engine, ExportJob
from lora_export.onnx_export.graphs.checks import check_model
from lora_export.onnx_export.graphs.finding import find_graphs
from lora_export.onnx_export.graphs.fusions import compare
from lora_export.onnx_export.quantize import certificate
from lora_export.onnx_export.quantize.settings import STATISTICS
from lora_export.onnx_export.records import ExportRecord
from lora_export.onnx_export.refusals import read_config
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.layout import DataFiles
from lora_export.onnx_export.weights.map import WeightsMap
from lora_export.onnx_export.weights.recheck_data import judge_constants, judge_data
from lora_export.onnx_export.weights.reuse import read_map
from lora_export.storage import sealed

# Of export.json: when and with what it was made, which leaves no trace in the other files.
_UNPROVABLE = ("seconds", "versions", "graph_versions", "fused_against_plain", "proof", "tried")
# Between graphs of the same weights, of the largest value: fp32 in another order, or rounded otherwise.
_CLOSE, _CLOSE_OTHERWISE = {"fp32": 1e-4}, 3e-2


@dataclass(frozen=True)
class Model:
    """folder: of the merged model, or an outline of it; source: its numbers; hashes: of its tensors, proved;
    quantization: what was asked for, of which an export with int8 activations keeps no record."""

    folder: Path
    source: TensorSource
    hashes: Mapping[str, str]
    quantization: QuantizationOptions


def check_graphs(folder: Path, name: str) -> Finding:
    """Whether all that a runtime may open as a graph is valid, with its weights in files beside it."""
    try:
        graphs = find_graphs(folder)
        for path in graphs:
            check_model(path)
    except LoraExportError as error:
        return Finding(name, False, plain(f"{error.where or folder}: {error.found}"))
    return Finding(name, True, f"{len(graphs)} valid, with their weights in files beside them")


def recheck(folder: Path, model: Model, rebuild: bool, progress: Progress) -> Findings:
    """Compare the export in `folder` with one of `model`. rebuild: its graph as well, by the engine that made it.

    What cannot be read or does not fit is a check that failed.
    """
    findings = Findings([check_graphs(folder, "onnx_graphs")])
    try:
        model = _with_modules(model)
        record = records.read_record(folder)
        if record.adapter:
            raise ExportError("the adapter of this export is not part of its weights", where=folder)
        with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch, Worker() as worker:
            job, chosen = _job(record, model, Path(scratch), worker, progress)
            _compare(findings, folder, record, _half_of(model, job.config), job, chosen, rebuild)
    except LoraExportError as error:
        findings.judge("onnx", "", [f"{error.found} ({error.where})" if error.where else error.found])
    return findings


def _with_modules(model: Model) -> Model:
    """With the tensors of sentence-transformers' modules beside the merged model."""
    source, beside = with_modules(model.source, model.folder), module_tensors(model.folder)
    hashes = {**model.hashes, **hash_all(source, beside)}
    return replace(model, source=source, hashes=dict(sorted(hashes.items())))


def _half_of(model: Model, config: Mapping[str, Any]) -> Model:
    """Without the tensors of an autoencoder's other graph."""
    source = own_half(model.source, config)
    if source is model.source:
        return model
    return replace(model, source=source, hashes={n: h for n, h in model.hashes.items() if n in source.tensors})


def _compare(
    findings: Findings,
    folder: Path,
    record: ExportRecord,
    model: Model,
    job: ExportJob,
    chosen: Engine,
    rebuild: bool,
) -> None:
    stage, progress = job.output, job.progress
    if record.activations != "float":
        _compare_whole(findings, folder, job, model, stage / "new")
        return
    if not rebuild:
        described = read_map(folder, record.graphs)
        _given_companions(findings, folder, record, model, stage, chosen)
        findings.not_checked.append(
            "the ONNX graph, weights-map.json and the runtime's configuration: not built anew"
        )
        judge_data(findings, folder, described, model.source, progress)
        return
    progress.stage(f"verify: the graph, built anew by the {chosen.name} engine")
    made = chosen.run(job)
    own = sorted(p.name for p in stage.iterdir() if p.suffix != ".data" and not p.name.endswith("_data"))
    chosen.accompany(model.folder, stage)
    described = weights_map.read(stage)
    weights_map.write(stage, replace(described, hashes=model.hashes))
    statistics = certificate.statistics_beside(folder, described)
    wanted = replace(record_of(job, made, chosen.name, "float"), part=record.part)
    wanted = replace(wanted, calibration=statistics.calibration if statistics else record.calibration)
    made_by_engine = tuple(n for n in own if n != weights_map.NAME)
    _judge_record(findings, folder, replace(wanted, made_by_engine=made_by_engine))
    if _of_other_versions(folder, stage, record):
        _beside_new_graphs(findings, folder, stage, described, record, model, job)
        return
    _judge_files(findings, folder, stage, described)
    judge_data(findings, folder, described, model.source, progress)
    judge_constants(findings, folder, stage, described)


def _compare_whole(findings: Findings, folder: Path, job: ExportJob, model: Model, new: Path) -> None:
    """An export whose weights no map describes, exported once more: it quantizes products, weights and all."""
    from lora_export.onnx_export import export

    if model.quantization.calibration is not None:
        findings.not_checked.append(
            f"the ONNX export, its graph and its weights: {model.quantization.calibration.name}, on which its "
            "activations were calibrated, is not part of a run"
        )
        return
    options = ExportOptions(job.precision, job.provider, None, job.optimize, model.quantization)
    export(model.folder, new, options, source=model.source, progress=job.progress)
    _judge_record(findings, folder, records.read_record(new))
    _judge_files(findings, folder, new, WeightsMap(()))


def _job(
    record: ExportRecord, model: Model, stage: Path, worker: Worker, progress: Progress
) -> tuple[ExportJob, Engine]:
    """The job that made the export. ExportError for a record of what no engine does."""
    config = placed(read_config(model.folder), record.part)
    chosen = choose(config, record.engine)
    if record.quantization:
        record.quantization.check()
    job = ExportJob(
        model.folder, config, stage, record.precision, record.provider, None, progress, worker,
        record.optimize, record.quantization,
    )  # fmt: skip
    chosen.check(job)
    return job, chosen


# --- graphs of other versions ------------------------------------------------------------------------------


def _of_other_versions(folder: Path, stage: Path, record: ExportRecord) -> bool:
    """Whether the graphs are others than those that are made here, and were not made by what is installed here."""
    graphs = [n for n in record.graphs if (stage / n).is_file()]
    same = all(sealed.sha256(folder / n) == sealed.sha256(stage / n) for n in graphs)
    return not same and record.graph_versions != records.versions()


def _beside_new_graphs(
    findings: Findings,
    folder: Path,
    stage: Path,
    described: WeightsMap,
    record: ExportRecord,
    model: Model,
    job: ExportJob,
) -> None:
    """Graphs that no version here makes: weights by their own map, outputs beside those of new graphs."""
    own = read_map(folder, record.graphs)
    made = {*record.graphs, *record.made_by_engine, weights_map.NAME}
    _judge_files(findings, folder, stage, described, frozenset(made))
    judge_data(findings, folder, own, model.source, job.progress)
    limit = _CLOSE.get(job.precision, _CLOSE_OTHERWISE)
    versions = f"they were made by {dict(record.graph_versions)}, here are {records.versions()}"
    findings.not_checked.append(f"the bytes of the ONNX graph, its map and configuration: {versions}")
    if job.precision == "bf16":
        findings.not_checked.append("what the ONNX graph computes: bf16 runs on CUDA alone")
        return
    job.progress.stage("verify: the graph beside one that was built anew, on made-up inputs")
    statistics = certificate.statistics_beside(folder, described)
    DataFiles(stage, described, model.source, job.progress, statistics=statistics).write()
    notes = []
    for name in record.graphs:
        try:
            compare(folder / name, stage / name, job.config, limit)
        except ExportError as error:
            notes.append(f"{name}: {error.found} ({versions})")
        except Exception as error:  # ONNX Runtime's have no base of their own
            notes.append(f"{name}: it does not run: {error}")
    findings.judge("onnx_outputs", f"made-up inputs give what a new graph gives, within {limit:g}", notes)


# --- small files -------------------------------------------------------------------------------------------


def _judge_record(findings: Findings, folder: Path, wanted: ExportRecord) -> None:
    record, new = sealed.read_json(folder / records.NAME), records.document(wanted)
    other = [n for n in sorted((record.keys() | new.keys()) - {*_UNPROVABLE}) if record.get(n) != new.get(n)]
    notes = [f"{n} is {record.get(n)!r}, a new export has {new.get(n)!r}" for n in other]
    findings.judge("onnx_record", "export.json says what a new export says", notes)
    findings.not_checked.append(f"{', '.join(_UNPROVABLE)} in export.json: no bytes of the export depend on them")


def _judge_files(
    findings: Findings, folder: Path, stage: Path, described: WeightsMap, without: frozenset[str] = frozenset()
) -> None:
    """Everything but the data files, the record, and what is to be left out."""
    left = {*described.sizes, records.NAME, STATISTICS, certificate.NAME, *without}
    wanted, there = (_hashes(f, left) for f in (stage, folder))
    notes = [f"{n} is missing" for n in sorted(wanted.keys() - there.keys())]
    notes += [f"{n} is not a file of an export" for n in sorted(there.keys() - wanted.keys())]
    unlike = sorted(n for n in wanted.keys() & there.keys() if wanted[n] != there[n])
    notes += [f"{n} is not what a new export has" for n in unlike]
    what = "" if without else ", graphs too"
    findings.judge("onnx_files", f"{len(wanted)} files beside the weights are those of a new export{what}", notes)


def _given_companions(
    findings: Findings, folder: Path, record: ExportRecord, model: Model, stage: Path, chosen: Engine
) -> None:
    """The files of the model that travel with the graph."""
    kept = {*record.graphs, *record.made_by_engine, weights_map.NAME, records.NAME, STATISTICS, certificate.NAME}
    for name in record.made_by_engine:
        if name.endswith(".json") and sealed.plain_name(name) and (folder / name).is_file():
            (stage / name).write_bytes((folder / name).read_bytes())
    chosen.accompany(model.folder, stage)
    data = set(weights_map.read(folder).sizes)
    wanted, there = (_hashes(f, kept | data) for f in (stage, folder))
    other = [n for n in sorted(wanted.keys() | there.keys()) if wanted.get(n) != there.get(n)]
    notes = [f"{n} is not what a new export has" for n in other]
    findings.judge(
        "onnx_files", f"{len(wanted)} files of the model beside the graph are those of a new export", notes
    )


def _hashes(folder: Path, without: set[str]) -> dict[str, Any]:
    hashes = {n: h for n, h in sealed.hash_folder(folder).items() if n not in without} if folder.is_dir() else {}
    links = [p for p in folder.rglob("*") if p.is_symlink() or not (p.is_file() or p.is_dir())]
    return hashes | {p.relative_to(folder).as_posix(): "a link, or not a file" for p in links}
