"""Which models of a pipeline become graphs, and in which folders: Optimum's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint.tensor_files import TensorFiles
from lora_export.contracts import Component, Pipeline, TensorInfo, TensorSource
from lora_export.errors import ExportError

PART = "pipeline_part"  # of the configuration that engines get: the folder of a graph in an export
UNET, TRANSFORMER, ENCODER, DECODER, TEXT = "unet", "transformer", "vae_encoder", "vae_decoder", "text_encoder"
# Class → the folders of its graphs; a text encoder keeps its own folder's name.
CLASSES: Mapping[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (UNET,),
    "SD3Transformer2DModel": (TRANSFORMER,),
    "FluxTransformer2DModel": (TRANSFORMER,),
    "AutoencoderKL": (ENCODER, DECODER),
    "CLIPTextModel": (TEXT,),
    "CLIPTextModelWithProjection": (TEXT,),
    "T5EncoderModel": (TEXT,),
}
# Models that Optimum's pipelines take from PyTorch, or do without.
LEFT_OUT = frozenset({"safety_checker", "image_encoder"})
_ORDER = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
# What of a checkpoint belongs to the other graph of an autoencoder.
_OTHERS: Mapping[str, tuple[str, ...]] = {
    ENCODER: ("decoder.", "post_quant_conv."),
    DECODER: ("encoder.", "quant_conv."),
}


@dataclass(frozen=True)
class Part:
    """A graph of a pipeline. folder: in the export; component: the model that it is made of."""

    folder: str
    component: Component


def parts_of(pipeline: Pipeline) -> tuple[Part, ...]:
    """The graphs of a pipeline, the denoiser's first. ExportError for a model that has none, by its name."""
    found = {n: c for n, c in pipeline.components.items() if n not in LEFT_OUT}
    for name, component in found.items():
        if component.class_name not in CLASSES or not (name in _ORDER or pipeline.class_name is None):
            raise _refusal(pipeline, component)
    return tuple(p for name in sorted(found, key=_place) for p in _of(found[name]))


def _place(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _of(component: Component) -> Iterator[Part]:
    for folder in CLASSES[component.class_name]:
        yield Part(component.name if folder == TEXT else folder, component)


def part_of(config: Mapping[str, Any]) -> str:
    """The folder of the graph of a model, as its configuration for engines says, or its class."""
    part = config.get(PART)
    return str(part) if part else CLASSES[str(config["_class_name"])][0]


def placed(config: dict[str, Any], part: str) -> dict[str, Any]:
    """The configuration of a model, with its place in a pipeline where it has one."""
    return {**config, PART: part} if part else config


def own_half(numbers: TensorSource, config: Mapping[str, Any]) -> TensorSource:
    """The tensors of a checkpoint without those of the other graph of an autoencoder."""
    others = _OTHERS.get(str(config.get(PART)))
    if others is None:
        return numbers
    tensors = {n: t for n, t in numbers.tensors.items() if not n.startswith(others)}
    return replace(numbers, tensors=tensors) if isinstance(numbers, TensorFiles) else _Selected(tensors, numbers)


@dataclass(frozen=True)
class _Selected(TensorSource):
    """Some of the tensors of a source."""

    tensors: Mapping[str, TensorInfo]
    source: TensorSource

    def known_hash(self, name: str) -> str | None:
        return self.source.known_hash(name)

    def file_size(self, file: Path) -> int:
        return self.source.file_size(file)


def _refusal(pipeline: Pipeline, component: Component) -> ExportError:
    whole = f" of {pipeline.class_name}" if pipeline.class_name else ""
    return ExportError(
        f"the component {component.name}{whole} is {component.class_name}, of which no graph is exported",
        where=component.folder,
        expected=", ".join(CLASSES),
        next_step="merge it, and use the merged pipeline with diffusers as it is: lora-export merge",
    )
