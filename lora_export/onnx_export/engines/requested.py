"""A traced export, asked of the worker: the request of a job, and what its process says that it made."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_export.onnx_export.engines.protocol import ExportJob, Made, architecture_of
from lora_export.storage import sealed

_RESULT = "result.json"  # in the folder of the job, until it is read


def requested(job: ExportJob, engine: str, module: str, **more: Any) -> Made:
    """Have `module` carry out a job, and tell what it left. more: what else it has to know."""
    request = {
        "model": str(job.model.resolve()),
        "output": str(job.output.resolve()),
        "precision": job.precision,
        "optimize": job.optimize,
        "quantized": asdict(job.quantized) if job.quantized else None,
        "architecture": architecture_of(job.config),
        "result": _RESULT,
        **more,
    }
    job.worker.run(module, request, engine=engine)
    path = Path(job.output, _RESULT)
    made: dict[str, Any] = sealed.read_json(path)
    path.unlink()
    return Made(made["kind"], made["task"], tuple(made["graphs"]), True)
