"""Is this the pipeline that an adapter file was trained on? Trainers write the kind of model into the metadata."""

from collections.abc import Iterator, Mapping

from lora_export.contracts import BaseCheck
from lora_export.merging.pipelines.planning import PipelinePlan

# The keys that name an architecture, in the order in which they are believed.
_KEYS = ("modelspec.architecture", "ss_base_model_version")
# What a name begins with → what the pipeline's class begins with.
_CLASSES = (
    (("stable-diffusion-v", "sd_v"), "StableDiffusion"),
    (("stable-diffusion-xl", "sdxl"), "StableDiffusionXL"),
    (("stable-diffusion-3", "sd3"), "StableDiffusion3"),
    (("flux-1", "flux1", "flux.1"), "Flux"),
    (("flux-2", "flux2", "flux.2"), "Flux2"),
    (("lumina-2", "lumina2"), "Lumina2"),
    (("qwen",), "QwenImage"),
    (("wan",), "Wan"),
)
# Longer names of classes that begin with a shorter one, and are another model.
_OTHERS = {"StableDiffusion": ("StableDiffusionXL", "StableDiffusion3"), "Flux": ("Flux2",)}


def pipeline_checks(planned: PipelinePlan) -> list[BaseCheck]:
    """One answer for each adapter of a pipeline: agrees, differs, or unknown."""
    name = planned.pipeline.class_name
    return [check for a in planned.adapters for check in _architecture(a.metadata, name)] if name else []


def _architecture(metadata: Mapping[str, str], class_name: str) -> Iterator[BaseCheck]:
    for key in _KEYS:
        told = metadata.get(key, "").lower()
        wanted = next((c for names, c in _CLASSES if told.startswith(names)), None)
        if wanted is not None:
            right = class_name.startswith(wanted) and not class_name.startswith(_OTHERS.get(wanted, ("\0",)))
            note = f"the file says {key} {metadata[key]}, the base is a {class_name}"
            yield BaseCheck("architecture", "agrees" if right else "differs", note)
            return
    yield BaseCheck("architecture", "unknown", "the file does not say what kind of model it was trained on")
