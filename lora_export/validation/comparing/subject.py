"""What every kind of model is asked about: its inputs, by the signature of its forward, and its folder."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_export.contracts import Check, Progress, ValidationResult
from lora_export.errors import InputError
from lora_export.validation.comparing.arithmetic import Arithmetic


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


@dataclass(frozen=True)
class Graph:
    """An exported model to be judged.

    paths: its graphs, the encoder's first; model: PyTorch's, in fp32, with the numbers that the graph holds (None
    where they cannot be read); arithmetic: how the graph computes; prefix: of the names of its checks; shifted: the
    numbers are quantized, each as near to its weight as it can be, so that what they do in PyTorch is known to be
    honest.
    """

    paths: tuple[Path, ...]
    model: Any
    arithmetic: Arithmetic
    provider: str
    prefix: str
    shifted: bool = False


class Story(Protocol):
    """windows: token ids (length,) on which perplexities are taken, none where a model has none; once: one forward
    without a cache; measure: the unmerged model's outputs and noise floors, which the other methods need."""

    @property
    def windows(self) -> Sequence[torch.Tensor]: ...

    def once(self, model: Any) -> Any: ...

    def measure(self, unmerged: Any) -> None: ...

    def compare(self, unmerged: Any, merged: Any) -> ValidationResult: ...

    def compare_onnx(self, unmerged: Any, graph: Graph) -> list[Check]:
        """The graph of the merged model: against the unmerged one, and against PyTorch with the graph's numbers."""
        ...

    def compare_base(self, unmerged: Any, graph: Graph) -> list[Check]:
        """The graph of the base, against PyTorch with its numbers. After compare_onnx."""
        ...

    def effect(self, unmerged: Any, base: Graph, merged: Graph) -> Any:
        """What the two graphs leave of the adapter's effect: an Effect, or an OutputEffect."""
        ...


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


@contextlib.contextmanager
def running(unmerged: Any) -> Iterator[None]:
    """Around forwards of the reference alone. InputError where transformers' or PEFT's own code cannot compute it:
    nothing about the merged model is known then, for good or for ill."""
    try:
        yield
    except MemoryError:
        raise
    except _FAILS as error:
        body, why = plain(unmerged), (str(error).splitlines() or [""])[0]
        raise InputError(
            "the unmerged model does not run here, so that nothing can be compared with it: "
            f"{type(body).__name__} ends with {type(error).__name__}{': ' if why else ''}{why}",
            expected="a base that transformers runs, and an adapter that PEFT runs on it, given "
            f"{', '.join(sorted(takes(body) & _SHOWN)) or 'its inputs'} alone",
            next_step="`lora-export verify`, which checks the arithmetic of the merge and runs no model",
        ) from error


# What a forward raises: of sizes that do not fit, of inputs that are missing, of layers that PEFT cannot wrap.
_FAILS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, IndexError, KeyError, NameError,
    NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
_SHOWN = {"input_ids", "attention_mask", "pixel_values", "input_values", "input_features", "decoder_input_ids"}
