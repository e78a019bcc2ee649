"""What every engine's export needs: its weights filled in, its damage measured, its record."""

import functools
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint import TensorFiles, open_checkpoint
from lora_export.checkpoint.hashing import hash_all
from lora_export.checkpoint.sentence import with_modules
from lora_export.choices import Activations
from lora_export.contracts import CalibrationRecord, Progress, TensorSource
from lora_export.errors import ExportError
from lora_export.onnx_export.diffusion.components import own_half
from lora_export.onnx_export.embedders import KEY as SENTENCE_MODULES
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made, architecture_of
from lora_export.onnx_export.graphs.checks import count_nodes
from lora_export.onnx_export.quantize import certificate
from lora_export.onnx_export.quantize.settings import AUTO, GPTQ, STATISTICS, Blockwise, are_statistics, escaped
from lora_export.onnx_export.records import ExportRecord
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.layout import DataFiles
from lora_export.onnx_export.weights.reuse import config_digest, refuse_undescribed
from lora_export.storage import disk, sealed


def numbers_of(model: Path, source: TensorSource | None, config: Mapping[str, Any]) -> TensorSource:
    """Where the numbers of an export come from: `source`, or else the files of the model; and its modules.

    config: says which half of an autoencoder is meant.
    """
    numbers = source or TensorFiles(open_checkpoint(model).tensors)
    return with_modules(own_half(numbers, config), model)


def fill(
    stage: Path, numbers: TensorSource, progress: Progress, hashed: bool = True, ready: tuple[Path, ...] = ()
) -> None:
    """Fill the data files of a new export. hashed: keep the hashes that tell the next export what has changed;
    ready: as in DataFiles."""
    described = weights_map.read(stage)
    if not isinstance(numbers, TensorFiles):
        refuse_undescribed(described, numbers)
    disk.check_space(stage, sum(described.sizes.values()))
    files = DataFiles(
        stage, described, numbers, progress,
        statistics=certificate.statistics_beside(stage, described), ready=ready,
    )  # fmt: skip
    files.write()
    certificate.write(stage, described, files.errors, ready)
    if hashed:
        hashes = weights_map.read(ready[0]).hashes if ready else hash_all(numbers)
        weights_map.write(stage, replace(described, hashes=hashes))


class PlainGraphs:
    """The fp32 graphs of a job, on which is measured what quantizing does; made when first asked for."""

    def __init__(self, job: ExportJob, chosen: Engine, source: TensorSource | None) -> None:
        self._job, self._engine, self._source = job, chosen, source
        self._folder = job.output / ".plain"

    @functools.cached_property
    def paths(self) -> tuple[Path, ...]:
        """An encoder's first."""
        self._folder.mkdir()
        plain = replace(self._job, output=self._folder, precision="fp32", provider="cpu", quantized=None)
        made = self._engine.run(plain)
        numbers = self._job.calibrated_on or numbers_of(self._job.model, self._source, self._job.config)
        fill(self._folder, numbers, self._job.progress, hashed=False)
        return tuple(self._folder / name for name in made.graphs)

    def remove(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)


def calibrate(job: ExportJob, plain: PlainGraphs) -> CalibrationRecord:
    """Put the statistics of the job's calibration beside its graphs."""
    from lora_export.onnx_export.quantize.statistics import Statistics, collect

    output, given = job.output / STATISTICS, job.calibration
    if given is not None and are_statistics(given):
        sealed.copy(given, output)
    else:
        job.progress.detail("measuring what the products read, on calibration texts")
        collect(plain.paths, job.model, given, output, progress=job.progress)
    return Statistics.open(output).calibration


def with_measured_damage(
    job: ExportJob, how: Blockwise, chosen: Engine, plain: PlainGraphs
) -> tuple[ExportJob, CalibrationRecord]:
    """The job, with int8 for the products whose int4 does the most measured damage for their size; and the text.

    For gptq, the job's statistics lie beside its graphs already.
    """
    from lora_export.onnx_export.quantize import calibration
    from lora_export.onnx_export.quantize.feeding import stages
    from lora_export.onnx_export.quantize.sensitivity import TOKENS, choose_kept
    from lora_export.onnx_export.quantize.statistics import Statistics

    if how.method != "int4" or job.adapter is not None or not chosen.mixes_bits(job.config):
        raise ExportError(
            f"--keep auto is not possible for {how.method} of {architecture_of(job.config)} ({chosen.name} engine)",
            expected="int4 of a merged model that reads texts",
            next_step="name nodes or tensors with --keep, or drop --keep auto",
        )
    how = replace(how, keep=tuple(k for k in how.keep if k != AUTO))
    job.progress.detail("measuring how much quantizing each product changes the outputs")
    text = calibration.read(None if are_statistics(job.calibration) else job.calibration)
    with tempfile.TemporaryDirectory(prefix=".between-", dir=job.output) as scratch:
        try:
            run, tokens, windows = stages(plain.paths, job.model, text, TOKENS, Path(scratch))
        except ExportError as error:
            raise ExportError(
                f"--keep auto measures on texts: {error.found}",
                where=error.where,
                expected=error.expected,
                next_step="name nodes or tensors with --keep, or drop --keep auto",
            ) from None
        damages = choose_kept(
            run,
            how,
            logits="logits" if chosen.generates(job.config) else None,
            eight_bits=True,
            statistics=Statistics.open(job.output / STATISTICS) if how.algorithm == GPTQ else None,
            progress=job.progress,
        )
    worst = [d for d in damages if d.kept]
    grown = sum(d.nbytes for d in worst)
    job.progress.detail(f"int8 for {len(worst)} of {len(damages)} groups of products, {grown / 1e6:.1f} MB more")
    tensors = escaped({tensor for d in worst for tensor in d.tensors})
    how = replace(how, eight_bits=(*how.eight_bits, *tensors))
    return replace(job, quantized=how), CalibrationRecord(text.sha256, tokens, windows)


def record_of(job: ExportJob, made: Made, engine: str, activations: Activations) -> ExportRecord:
    """How an export was made, as far as the job tells; its time is not known yet."""
    return ExportRecord(
        engine=engine,
        precision=job.precision,
        provider=job.provider,
        optimize=job.optimize,
        kind=made.kind,
        task=made.task,
        graphs=made.graphs,
        nodes=sum(count_nodes(job.output / name) for name in made.graphs),
        architecture=architecture_of(job.config),
        quantization=job.quantized,
        activations=activations,
        adapter=job.adapter is not None,
        source_config_sha256=sealed.sha256(job.model / "config.json"),
        config_digest=config_digest(job.config),
        sentence_modules=tuple(m["kind"] for m in job.config.get(SENTENCE_MODULES, ())),
        seconds=0.0,
    )
