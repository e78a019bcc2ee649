"""What every kind of model is asked about: its inputs, by the signature of its forward, and its folder."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_export.contracts import Check, ExportedPair, Progress, ValidationResult


@dataclass(frozen=True)
class Subject:
    """model: the reference's, whose configuration and signature tell the inputs; folder: where its tokenizer or
    processor may lie; dtypes: stored type of each merged parameter; prompts: texts, from prompts_file if given;
    text: running text, from text_file if given; factor: thresholds are this many noise floors; seed: of all that is
    drawn. Nothing here comes from the merged folder, which would then choose on what it is judged."""

    model: Any
    folder: Path
    dtypes: Mapping[str, torch.dtype]
    prompts: tuple[str, ...]
    prompts_file: Path | None
    progress: Progress
    text: str
    text_file: Path | None
    factor: float
    seed: int = 0


class Story(Protocol):
    """windows: token ids (length,) on which perplexities are taken, none where a model has none; once: one forward
    without a cache; measure: the unmerged model's outputs and noise floors, which `compare` begins with, and which
    `compare_onnx` needs."""

    @property
    def windows(self) -> Sequence[torch.Tensor]: ...

    def once(self, model: Any) -> Any: ...

    def measure(self, unmerged: Any) -> None: ...

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult: ...

    def compare_onnx(self, pair: ExportedPair, provider: str) -> list[Check]: ...


def takes(model: Any) -> set[str]:
    """The names of forward's parameters."""
    return set(inspect.signature(model.forward).parameters) - {"kwargs", "args", "labels", "return_dict"}


def generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def is_pair(model: Any) -> bool:
    """Two towers that are compared with each other, such as CLIP's."""
    others = ("get_image_features", "get_audio_features")
    return hasattr(model, "get_text_features") and any(hasattr(model, name) for name in others)


def setting(config: Any, *names: str) -> Any:
    """The first of these that the configuration has, None if there is none."""
    return next((v for v in (getattr(config, name, None) for name in names) if v is not None), None)


def plain(model: Any) -> Any:
    """The transformers model itself. PEFT's task classes pass on only the inputs of their own task; the layers that
    they wrapped are wrapped in here, too."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
