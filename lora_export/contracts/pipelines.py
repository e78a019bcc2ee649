"""A pipeline of diffusers: the models in its folder, and what an adapter file changes in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Library = Literal["diffusers", "transformers"]
AdapterFormat = Literal[
    "kohya",
    "diffusers",
    "diffusers-old",
    "peft",
    "original",
    "onetrainer",
    "simpletuner",
    "xlabs",
    "bfl",
    "lycoris",
]


@dataclass(frozen=True)
class Component:
    """A model of a pipeline.

    name: of its folder (`unet`, `text_encoder_2`), or its role where it is a model alone; folder: with its weights;
    class_name: of diffusers or transformers; config: its config.json.
    """

    name: str
    folder: Path
    library: Library
    class_name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Pipeline:
    """class_name: of model_index.json, None for a model alone; components: models with weights, by name; others:
    the names of components without: scheduler, tokenizers; index: model_index.json."""

    folder: Path
    class_name: str | None
    components: Mapping[str, Component]
    others: tuple[str, ...] = ()
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> Component | None:
        """The model that is run once a step: a UNet or a transformer."""
        return next((self.components[n] for n in ("unet", "transformer") if n in self.components), None)


@dataclass(frozen=True)
class Piece:
    """Rows of a weight that an adapter trained, as the base stores them.

    module: of the base's tensors (`down_blocks.0.attentions.0.proj_in`), which has `.weight` and perhaps `.bias`;
    where `bare`, the whole name of a parameter that no module owns; rows: (start, stop) of the trained weight, None
    for all of it; swap: its upper and its lower half change places on the way to the base.
    """

    module: str
    rows: tuple[int, int] | None = None
    swap: bool = False
    bare: bool = False


@dataclass(frozen=True)
class TrainedModule:
    """The tensors of an adapter file that belong to one trained module.

    spelling: its name there; component: of the pipeline; pieces: where it lies in the base; keys: part
    (`lora_down`, `hada_w1_a`, `dora_scale`, …) → name of the tensor; alpha: of the tensor `alpha` or the metadata,
    None where nothing says it; alpha_key: the tensor that it was read from.
    """

    spelling: str
    component: str
    pieces: tuple[Piece, ...]
    keys: Mapping[str, str]
    alpha: float | None = None
    alpha_key: str | None = None


@dataclass(frozen=True)
class DiffusionAdapter:
    """An adapter of a pipeline, understood from headers and metadata.

    path: the file, or the folder of a PEFT adapter; config: of a PEFT folder, or of diffusers' metadata; modules:
    of all components, empty for a PEFT folder of a kind that PEFT alone defines; kinds: how many modules are of
    each; vectors: textual-inversion tensors beside the weights, by name; unused: tensors of zeros that no tool
    applies; warnings: for people.
    """

    path: Path
    format: AdapterFormat
    weight: float
    modules: tuple[TrainedModule, ...]
    kinds: Mapping[str, int]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    vectors: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
