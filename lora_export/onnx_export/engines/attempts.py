"""Which engine makes an export: the first whose graph is proven, of those that take the model."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.choices import Optimize
from lora_export.contracts import Attempt, CalibrationRecord, Proof, TensorSource
from lora_export.errors import ExportError
from lora_export.onnx_export.engines import fitting
from lora_export.onnx_export.engines.building import (
    PlainGraphs,
    calibrate,
    fill,
    numbers_of,
    with_measured_damage,
)
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made, architecture_of
from lora_export.onnx_export.quantize.settings import AUTO, GPTQ, STATISTICS

Prove = Callable[[Engine, ExportJob, Made, bool], Proof]
_LONGEST = 200  # characters of what is said of another attempt
_CHECK, _RUN, _PROOF = range(3)  # how far an attempt came


@dataclass(frozen=True)
class Produced:
    """An export in the folder of its job. own: files that the engine wrote, weights aside; proof: None where nobody
    asked for one; tried: what was not taken before it; calibration: of a quantizer that reads texts."""

    engine: Engine
    job: ExportJob
    made: Made
    own: tuple[str, ...]
    proof: Proof | None
    tried: tuple[Attempt, ...]
    calibration: CalibrationRecord | None = None


@dataclass
class _Try:
    engine: Engine
    optimize: Optimize
    stage: int = _CHECK
    error: ExportError | None = None

    @property
    def name(self) -> str:
        return f"{self.engine.name}, --optimize {self.optimize}" if self.engine.optimizes else self.engine.name


def produce(
    job: ExportJob, engine: str | None, source: TensorSource | None, prove: Prove | None, integers: bool
) -> Produced:
    """Run the engines for `job` in turn, and take the first whose graph is proven.

    engine: the only one to be tried; integers: whether products become integer ones later, for which the engine
    writes fp32. An engine that refuses, fails, or writes a wrong graph gives way to the next; a wrong graph with
    fusions, first to its engine's plain one. ExportError with what came of those that got furthest, if none is
    left.
    """
    tries: list[_Try] = []
    for each in fitting(job.config, engine):
        for optimize in _levels(each, job.optimize):
            attempt = _Try(each, optimize)
            tries.append(attempt)
            try:
                own_job = replace(job, optimize=optimize)
                produced = _produced(attempt, own_job, source, prove, integers)
            except ExportError as error:
                attempt.error = error
                job.progress.detail(f"{attempt.name}: {error.found}")
                _clear(job.output)
                if attempt.stage == _CHECK:
                    break
                continue
            tried = tuple(Attempt(t.name, t.error.found[:_LONGEST]) for t in tries if t.error)
            for other in tried:
                job.progress.warn(f"{attempt.name} takes the place of {other.engine}: {other.reason}")
            return replace(produced, tried=tried)
    raise _refusal(tries)


def _levels(engine: Engine, wanted: Optimize) -> Iterator[Optimize]:
    yield wanted
    if engine.optimizes and wanted != "none":
        yield "none"


def _produced(
    attempt: _Try, job: ExportJob, source: TensorSource | None, prove: Prove | None, integers: bool
) -> Produced:
    chosen = attempt.engine
    chosen.check_precision(job.precision, job.provider)
    chosen.check(job)
    attempt.stage = _RUN
    plain, calibration = PlainGraphs(job, chosen, source), None
    by_texts = job.quantized is not None and job.quantized.algorithm == GPTQ
    if job.quantized and AUTO in job.quantized.keep:
        calibration = calibrate(job, plain) if by_texts and job.adapter is None else None
        job, measured_on = with_measured_damage(job, job.quantized, chosen, plain)
        calibration = calibration or measured_on
    precision = "fp32" if integers else job.precision
    job.progress.detail(f"{architecture_of(job.config)} with {attempt.name}, {job.precision} for {job.provider}")
    made = chosen.run(replace(job, precision=precision))
    own = tuple(sorted(p.name for p in job.output.iterdir() if p.is_file() and not _holds_weights(p)))
    chosen.accompany(job.model, job.output)
    if made.described and by_texts and calibration is None:
        calibration = calibrate(job, plain)
    plain.remove()
    if made.described:
        fill(job.output, numbers_of(job.model, source, job.config), job.progress, ready=job.ready)
    attempt.stage = _PROOF
    proof = None
    if prove and chosen.comparable:
        proof = prove(chosen, replace(job, precision=precision), made, source is not None)
    elif prove:
        job.progress.warn(
            f"the engine {chosen.name} says that its graphs cannot be compared with transformers' model"
        )
    return Produced(chosen, job, made, own, proof, (), calibration)


def _holds_weights(path: Path) -> bool:
    return path.suffix == ".data" or path.name.endswith("_data") or path.name == STATISTICS


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _refusal(tries: list[_Try]) -> ExportError:
    """The error of the attempt that got furthest, the first of them; it names the others that came as far."""
    furthest = max(tries, key=lambda t: t.stage)
    error = furthest.error
    assert error is not None
    others = [t for t in tries if t is not furthest and t.error and t.error.found != error.found]
    if furthest.stage == _CHECK:
        return error
    more = "".join(f"; {t.name}: {t.error.found[:_LONGEST]}" for t in others if t.error)
    return ExportError(
        error.found + more,
        where=error.where,
        tensor=error.tensor,
        expected=error.expected,
        next_step=error.next_step,
    )


def check_all(config: Mapping[str, Any], engine: str | None, check: Callable[[Engine], None]) -> Engine:
    """The first engine that passes `check`; the error of the first one, if none does."""
    first: ExportError | None = None
    for each in fitting(config, engine):
        try:
            check(each)
        except ExportError as error:
            first = first or error
            continue
        return each
    assert first is not None
    raise first
