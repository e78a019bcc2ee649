"""Another adapter in a merged pipeline: a fresh merge beside it, which takes its place in one step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_export.checkpoint.pipeline import open_pipeline
from lora_export.contracts import AdapterChoice, MergeOptions, Progress, TensorRecord
from lora_export.errors import CheckpointError, InputError
from lora_export.merging import CERTIFICATE
from lora_export.merging.certificate.document import read_certificate
from lora_export.merging.pipelines.document import is_merged_pipeline, read_pipeline_certificate, sha256_of_files
from lora_export.merging.pipelines.merging import merge_planned_pipeline
from lora_export.merging.pipelines.planning import plan_pipeline


def switch_pipeline(
    folder: Path, base: Path, before: Sequence[AdapterChoice], after: Sequence[AdapterChoice], progress: Progress
) -> tuple[int, int]:
    """How many weights either adapter changes, and the bytes of all weights that were written.

    InputError or CheckpointError if the folder does not hold `before`, or was merged from another base. Until the
    end the folder is as it was.
    """
    options, held, names = _recorded(folder, base)
    if [(sha256_of_files(c.folder), c.weight) for c in before] != held:
        raise InputError(
            "the pipeline was not merged from the adapters of --from",
            where=folder / CERTIFICATE,
            expected="the adapters and weights that are in it, in their order",
            next_step="lora-export verify FOLDER -b PIPELINE -a ADAPTER says which file differs",
        )
    records = {name: read_certificate(part).records for name, part in names.items()}
    planned = plan_pipeline(base, after, options)

    def accept(name: str, made: Sequence[TensorRecord]) -> None:
        hashes = {r.name: r.hash_in for r in records.get(name, ())}
        for record in made:
            if hashes.get(record.name) not in (None, record.hash_in):
                raise CheckpointError(
                    "this tensor of the base is not the one that the pipeline was merged from",
                    where=base,
                    tensor=f"{name}: {record.name}",
                    expected="the same base",
                    next_step="give that base as -b",
                )

    merge_planned_pipeline(planned, folder, progress, force=True, accept=accept)
    touched = {(n, r.name) for n, all_ in records.items() for r in all_ if r.kinds}
    touched |= {(n, name) for n, plan in planned.components.items() for name in plan.touched}
    return len(touched), planned.nbytes


def _recorded(
    folder: Path, base: Path
) -> tuple[MergeOptions, list[tuple[dict[str, str], float]], Mapping[str, Path]]:
    """Options, adapters with their weights, and the folders of the merged components, by the certificate."""
    if is_merged_pipeline(folder):
        of_all = read_pipeline_certificate(folder)
        held = [(dict(a.sha256), a.weight) for a in of_all.adapters]
        return of_all.options, held, {name: folder / name for name in of_all.components}
    own = read_certificate(folder)
    (name,) = open_pipeline(base).components if open_pipeline(base).class_name is None else ("",)
    if not name:
        raise InputError(
            "the folder is a model alone, and the base a whole pipeline",
            where=folder,
            expected="the base that it was merged from",
            next_step=f"-b {base}/NAME, the folder of that model",
        )
    return own.options, [(dict(a.sha256), a.weight) for a in own.adapters], {name: folder}
