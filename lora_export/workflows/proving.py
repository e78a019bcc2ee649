"""The proof of an export in the engines' process: what it is asked, and what its verdict means for the export."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.choices import ProofLevel
from lora_export.contracts import Proof
from lora_export.errors import ExportError
from lora_export.storage import sealed

if TYPE_CHECKING:
    from lora_export.onnx_export.engines.protocol import ExportJob, Made

_PROCESS, _RESULT = "lora_export.validation.proof.process", "proof.json"
_INT8 = 4  # accuracy level


def prover(level: ProofLevel) -> "Callable[[ExportJob, Made, bool], Proof]":
    """What `onnx_export.export` takes to prove its graphs."""

    def prove(job: "ExportJob", made: "Made", streamed_numbers: bool) -> Proof:
        started = time.monotonic()
        verdict = _verdict(job, made, level, streamed_numbers)
        if not verdict["passed"]:
            raise _refusal(job, made, verdict)
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


def _verdict(job: "ExportJob", made: "Made", level: ProofLevel, streamed_numbers: bool) -> dict[str, Any]:
    from lora_export.runtime import why_not

    provider = "cpu" if job.provider == "cpu" or why_not(job.provider) else job.provider
    request = {
        "model": str(job.model.resolve()),
        "export": str(job.output.resolve()),
        "graphs": list(made.graphs),
        "kind": made.kind,
        "precision": job.precision,
        "provider": provider,
        "elsewhere": job.provider if job.provider != provider else "",
        "level": level,
        "streamed_numbers": streamed_numbers,
        "eight_bits": job.quantized is not None and job.quantized.accuracy_level == _INT8,
        "adapter": str(job.adapter.resolve()) if job.adapter else None,
        "result": _RESULT,
    }
    job.progress.detail("proving the graph: PyTorch and ONNX Runtime on inputs that were not traced")
    job.worker.run(_PROCESS, request, engine="", task="the proof of the export")
    path = Path(job.output, _RESULT)
    verdict: dict[str, Any] = sealed.read_json(path)
    path.unlink()
    return verdict


def _refusal(job: "ExportJob", made: "Made", verdict: dict[str, Any]) -> ExportError:
    figure = verdict["note"]
    if not figure:
        share = float(verdict["difference"])
        figure = f"{verdict['output']} differs by {share:.2g} of its largest value"
    case = f" ({verdict['case']})" if verdict["case"] else ""
    module = f"; the first module that differs is {verdict['module']}" if verdict["module"] else ""
    return ExportError(
        f"the graph does not compute what PyTorch does: {figure}{case}{module}",
        where=verdict["graph"] or made.graphs[0],
        tensor=", ".join(verdict["tensors"]) or None,
        expected=f"a difference of at most {float(verdict['allowed']):.2g}",
        next_step="use the merged folder with transformers, vLLM or TGI as it is: lora-export merge",
    )
