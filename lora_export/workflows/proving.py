"""The proof of an export in the engines' process: what it is asked, and what its verdict means for the export."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.choices import ProofLevel
from lora_export.contracts import Proof
from lora_export.errors import ExportError
from lora_export.storage import sealed

if TYPE_CHECKING:
    from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made

_PROCESS, _RESULT = "lora_export.validation.proof.process", "proof.json"
# What engines and proofs import, the slowest first: for `Worker.warm`.
WARM = ("torch", "transformers.modeling_utils", _PROCESS, "onnxruntime_genai.models.builder")


def prover(level: ProofLevel) -> "Callable[[Engine, ExportJob, Made, bool], Proof]":
    """What `onnx_export.export` takes to prove its graphs."""

    def prove(engine: "Engine", job: "ExportJob", made: "Made", streamed_numbers: bool) -> Proof:
        started = time.monotonic()
        verdict = _verdict(job, made, level, streamed_numbers)
        if verdict["passed"] and verdict["fewer_layers"] and not streamed_numbers:
            verdict = _joined(verdict, _far(engine, job, level))
        if not verdict["passed"]:
            raise _refusal(made, verdict)
        for limit in verdict["limits"]:
            job.progress.detail(f"a limit of the graph: {limit}")
        return Proof(
            cases=verdict["cases"],
            difference=float(verdict["difference"]),
            allowed=float(verdict["allowed"]),
            case=verdict["case"],
            output=verdict["output"],
            reference=verdict["reference"],
            level=level,
            experts=verdict["experts"],
            limits=tuple(verdict["limits"]),
            not_reached=tuple(verdict["not_reached"]),
            seconds=round(time.monotonic() - started, 3),
        )

    return prove


def _far(engine: "Engine", job: "ExportJob", level: ProofLevel) -> dict[str, Any]:
    """The verdict beyond windows and original lengths, on the first layers, exported by the same engine."""
    from lora_export.onnx_export.engines.building import fill, numbers_of
    from lora_export.workflows.fewer_layers import with_fewer_layers

    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        model, output = Path(scratch, "model"), Path(scratch, "onnx")
        model.mkdir()
        output.mkdir()
        layers = with_fewer_layers(job.model, model)
        job.progress.detail(f"far lengths: proving the first {layers} layers behind a made-up cache")
        config = sealed.read_json(model / "config.json", limit=sealed.LARGEST_SETTINGS)
        short = replace(job, model=model, output=output, config=config)
        made = engine.run(short)
        if made.described:
            fill(output, numbers_of(job.model, None, config), job.progress, hashed=False)  # links out are refused
        verdict = _verdict(short, made, level, False, far_only=True)
        return verdict | {"case": f"{verdict['case']}, of the first {layers} layers"}


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict with the larger share of what is allowed, for the cases of both."""
    shares = [float(v["difference"]) / float(v["allowed"]) for v in (one, other)]
    worse = other if not other["passed"] or shares[1] > shares[0] else one
    kept = {"cases": one["cases"] + other["cases"], "reference": one["reference"], "experts": one["experts"]}
    return {**worse, **kept, "limits": one["limits"], "not_reached": one["not_reached"]}


def _verdict(
    job: "ExportJob", made: "Made", level: ProofLevel, streamed_numbers: bool, far_only: bool = False
) -> dict[str, Any]:
    from lora_export.onnx_export.diffusion.components import part_of
    from lora_export.onnx_export.engines.protocol import architecture_of
    from lora_export.runtime import why_not

    provider = "cpu" if job.provider == "cpu" or why_not(job.provider) else job.provider
    request = {
        "model": str(job.model.resolve()),
        "export": str(job.output.resolve()),
        "graphs": list(made.graphs),
        "kind": made.kind,
        "part": part_of(job.config) if made.kind == "component" else "",
        "architecture": architecture_of(job.config),
        "precision": job.precision,
        "provider": provider,
        "elsewhere": job.provider if job.provider != provider else "",
        "level": level,
        "streamed_numbers": streamed_numbers,
        "far_only": far_only,
        "adapter": str(job.adapter.resolve()) if job.adapter else None,
        "result": _RESULT,
    }
    job.progress.detail("proving the graph: PyTorch and ONNX Runtime on inputs that were not traced")
    job.worker.run(_PROCESS, request, engine="", task="the proof of the export")
    path = Path(job.output, _RESULT)
    verdict: dict[str, Any] = sealed.read_json(path)
    path.unlink()
    return verdict


def _refusal(made: "Made", verdict: dict[str, Any]) -> ExportError:
    figure = verdict["note"]
    if not figure:
        share = float(verdict["difference"])
        figure = f"{verdict['output']} differs by {share:.2g} of its largest value"
    case = f" ({verdict['case']})" if verdict["case"] else ""
    module = f"; the first module that differs is {verdict['module']}" if verdict["module"] else ""
    what = "does not compute what PyTorch does" if verdict["cases"] else "cannot be compared with PyTorch"
    return ExportError(
        f"the graph {what}: {figure}{case}{module}",
        where=verdict["graph"] or made.graphs[0],
        tensor=", ".join(verdict["tensors"]) or None,
        expected=f"a difference of at most {float(verdict['allowed']):.2g}",
        next_step="use the merged folder with transformers, vLLM or TGI as it is: lora-export merge",
    )
