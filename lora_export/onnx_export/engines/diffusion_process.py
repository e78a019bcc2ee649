"""Run by diffusion.py in a process of its own: one model of a pipeline through torch's dynamo exporter.

Like dynamo_process.py, it writes the file that the request names as `result` besides the graph.
"""

import contextlib
import warnings
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    from lora_export.onnx_export.engines import dynamo_process
    from lora_export.onnx_export.engines.dynamo_passes import attention, group_norm
    from lora_export.onnx_export.engines.parts import diffusion

    attention.register()
    with contextlib.ExitStack() as replaced:
        if request["optimize"] == "full":
            replaced.enter_context(attention.in_torch())
            if request["provider"] == "cuda":
                replaced.enter_context(group_norm.in_torch())
        model = _load(request)
        traced = diffusion.parts_of(model.model, request["part"])
        dynamo_process.write(request, lambda: (model, traced), diffusion.WIDE, group_norm.finish)


def _load(request: dict[str, Any]) -> Any:
    """The model without its weights, of whichever library."""
    from lora_export.onnx_export.engines import diffusers_model, model_without_weights

    folder, architecture = Path(request["model"]), request["architecture"]
    if request["library"] == "diffusers":
        return diffusers_model.load_without_weights(architecture, folder)
    import transformers

    from lora_export.checkpoint.weight_files import weight_files
    from lora_export.onnx_export.engines.dynamo_passes import attention

    attends = attention.NAME if request["optimize"] == "full" else "eager"
    variant = weight_files(folder).variant
    more = {"variant": variant} if variant else {}
    return model_without_weights.load_without_weights(
        getattr(transformers, architecture), folder, attn_implementation=attends, **more
    )
