"""What is this pipeline? Answered from headers and configuration files alone."""

from collections import Counter
from pathlib import Path
from typing import Any

from lora_export.checkpoint.pipeline import open_component, open_pipeline
from lora_export.checkpoint.weight_files import variants_in
from lora_export.contracts import Component
from lora_export.errors import LoraExportError
from lora_export.quantization import describe, method_here, settings_of, with_settings
from lora_export.workflows.parameters import parameters_of_base

CERTIFICATE = "lora_export_certificate.json"
# Of a component's config.json, what decides which adapters and pictures fit it.
_TOLD = (
    "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim",
    "hidden_size", "d_model", "vocab_size", "latent_channels", "num_layers", "num_single_layers", "sample_size",
    "scaling_factor", "force_upcast", "guidance_embeds",
)  # fmt: skip


def inspect_pipeline(folder: Path) -> dict[str, Any]:
    """`kind` (pipeline, or component for a model of diffusers alone), and facts about each model in it."""
    pipeline = open_pipeline(folder)
    components = {name: _component(component) for name, component in pipeline.components.items()}
    known = [c for c in components.values() if c["problem"] is None]
    if pipeline.class_name is None:
        ((name, only),) = components.items()
        return {"kind": "component", "role": name} | only
    index = pipeline.index
    return {
        "kind": "pipeline",
        "class": pipeline.class_name,
        "denoiser": pipeline.denoiser.name if pipeline.denoiser else None,
        "parameters": sum(c["parameters"] for c in known),
        "bytes": sum(c["bytes"] for c in known),
        "dtypes": dict(sum((Counter(c["dtypes"]) for c in known), Counter())),
        "components": components,
        "without_weights": {name: index[name][1] for name in pipeline.others},
        "absent": [name for name, told in index.items() if told == [None, None]],
        "saved_by_diffusers": index.get("_diffusers_version"),
        "merged_by_lora_export": (folder / CERTIFICATE).is_file(),
    }


def _component(component: Component) -> dict[str, Any]:
    """One model; `problem`: why its weights cannot be read, None where they can."""
    folder, config = component.folder, component.config
    document: dict[str, Any] = {
        "class": component.class_name,
        "library": component.library,
        "settings": {key: config[key] for key in _TOLD if config.get(key) is not None},
        "variants": [variant or "none" for variant in variants_in(folder)],
        "merged_by_lora_export": (folder / CERTIFICATE).is_file(),
    }
    try:
        checkpoint = open_component(component)
    except LoraExportError as error:
        return document | {"problem": error.found}
    quantization = settings_of(with_settings(folder, config))
    return document | {
        "parameters": parameters_of_base(checkpoint),
        "dtypes": dict(Counter(t.dtype for t in checkpoint.tensors.values())),
        "bytes": checkpoint.nbytes,
        "tensors": len(checkpoint.tensors),
        "files": sorted({t.file.name for t in checkpoint.tensors.values()}),
        "quantization": describe(quantization) if quantization else method_here(checkpoint, config),
        "problem": None,
    }
