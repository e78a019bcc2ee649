"""export.json: what an export records of itself. What the graphs themselves tell is not taken from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_export.choices import Activations, ModelKind, Optimize, Precision, Provider
from lora_export.contracts import Attempt, CalibrationRecord, ExportResult, Proof
from lora_export.errors import InputError
from lora_export.onnx_export.quantize import certificate
from lora_export.onnx_export.quantize.settings import Blockwise
from lora_export.storage import sealed
from lora_export.storage.documents import as_json, decode
from lora_export.version import installed

NAME = "export.json"


@dataclass(frozen=True)
class ComponentRecord:
    """An export of a pipeline's model. class_name: of diffusers or transformers; source: the folder of the model in
    the pipeline; note: why its precision is another than was asked for; record_sha256: of its export.json."""

    class_name: str
    source: str
    precision: Precision
    nodes: int
    note: str = ""
    record_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """Fields with a default are those that an export of an older version may lack.

    proof, tried, calibration: as in ExportResult; made_by_engine: files that the engine wrote, weights and their
    map aside; files: in a folder that adapters share, those of this adapter; pluggable: the adapters whose
    .onnx_adapter files lie beside the graph; sentence_modules: the classes in modules.json that the task and
    `sentence_embedding` follow from; part: the place of a model in its pipeline; components: of a pipeline, by the
    folders of their exports; graph_versions: installed when the graphs were made; versions: when the record was
    written.
    """

    engine: str
    precision: Precision
    provider: Provider = "cpu"
    optimize: Optimize = "full"
    kind: ModelKind
    task: str = "text-generation"
    graphs: tuple[str, ...] = ("model.onnx",)
    nodes: int
    architecture: str = ""
    quantization: Blockwise | None = None
    activations: Activations = "float"
    calibration: CalibrationRecord | None = None
    adapter: bool = False
    source_config_sha256: str = ""
    config_digest: str = ""
    sentence_modules: tuple[str, ...] = ()
    proof: Proof | None = None
    tried: tuple[Attempt, ...] = ()
    seconds: float
    made_by_engine: tuple[str, ...] = ()
    files: tuple[str, ...] | None = None
    pluggable: tuple[str, ...] | None = None
    part: str = ""
    components: Mapping[str, ComponentRecord] | None = None
    graph_versions: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def load_export(place: Path) -> ExportResult:
    """What an earlier export left in a folder, or as one graph of a folder that adapters share.

    InputError if there is none.
    """
    name = NAME if place.is_dir() else f"{place.stem}.{NAME}"
    folder = place if place.is_dir() else place.parent
    record = read_record(folder, name)
    return ExportResult(
        output=folder,
        engine=record.engine,
        precision=record.precision,
        nodes=record.nodes,
        seconds=record.seconds,
        files={n: size for n, size in sealed.sizes(folder).items() if record.files is None or n in record.files},
        kind=record.kind,
        task=record.task,
        graphs=record.graphs,
        proof=record.proof,
        tried=record.tried,
        activations=record.activations,
        calibration=record.calibration,
        quantized=certificate.summary(folder),
    )


def adapters_beside(folder: Path) -> list[str]:
    """The adapters that share the folder with an export, and those that its graph takes as inputs."""
    shared = [p.name.removesuffix(f".{NAME}") for p in folder.glob(f"*.{NAME}")]
    return sorted([*shared, *(p.stem for p in folder.glob("*.onnx_adapter"))])


def read_record(folder: Path, name: str = NAME) -> ExportRecord:
    """export.json, or an adapter's own record of that name, whose graphs exist. InputError for anything else."""
    path = folder / name
    if not path.is_file():
        raise _no_export(folder, f"model.onnx and {name}")
    record = decode(sealed.read_json(path), ExportRecord, "the record of the export", path)
    for graph in record.graphs:
        whole = sealed.plain_path(graph) if record.kind == "pipeline" else sealed.plain_name(graph)
        if not whole or not (folder / graph).is_file():
            raise _no_export(folder, f"{graph!r}, which {path.name} names")
    if not record.graphs:
        raise _no_export(folder, f"a graph; {path.name} names none")
    return record


def _no_export(folder: Path, expected: str) -> InputError:
    return InputError(
        "the folder holds no export",
        where=folder,
        expected=expected,
        next_step="lora-export export -m MODEL -o OUT",
    )


def write_record(folder: Path, record: ExportRecord, name: str = NAME) -> None:
    sealed.write_json(folder / name, document(replace(record, versions=versions())))


def document(record: ExportRecord) -> dict[str, Any]:
    """The record as JSON, without fields that this sort of export does not have."""
    fields: dict[str, Any] = as_json(record)
    absent = {k for k in ("files", "pluggable", "calibration", "components") if fields[k] is None}
    absent |= {"sentence_modules"} if not record.sentence_modules else set()
    absent |= {"part"} if not record.part else set()
    return {k: v for k, v in fields.items() if k not in absent}


def versions() -> dict[str, str]:
    """Installed versions of the packages that make graphs."""
    names = ("onnxruntime-genai-cuda", "onnxruntime-genai", "onnx", "torch", "transformers")
    return {n.removesuffix("-cuda").replace("-", "_"): v for n, v in installed(names).items()}
