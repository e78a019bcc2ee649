"""The model that is validated: its inputs, read from the signature of its forward and from its folder."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_export.contracts import Progress, ValidationOptions
from lora_export.errors import InputError

if TYPE_CHECKING:
    from lora_export.validation.known import Answers


@dataclass(frozen=True)
class ModelUnderTest:
    """model: the reference, whose configuration and signature determine the inputs; folder: where its tokenizer or
    processor may lie; dtypes: stored type of each merged parameter; prompts, text: read from the files of `options`
    or built in; answers: what is known of the base. Nothing here comes from the merged folder, which else would
    choose what it is judged on."""

    model: Any
    folder: Path
    dtypes: Mapping[str, torch.dtype]
    prompts: tuple[str, ...]
    text: str
    options: ValidationOptions
    progress: Progress
    answers: "Answers | None" = None

    @property
    def seed(self) -> int:
        return self.options.seed or 0

    @property
    def common(self) -> dict[str, Any]:
        """What every comparison of this model is built with."""
        given = {"dtypes": self.dtypes, "progress": self.progress, "factor": self.options.tolerance}
        return {**given, "answers": self.answers}


def takes(model: Any) -> set[str]:
    """The names of forward's parameters."""
    return set(inspect.signature(model.forward).parameters) - {"kwargs", "args", "labels", "return_dict"}


def generates(model: Any) -> bool:
    return bool(getattr(model, "can_generate", lambda: False)())


def is_pair(model: Any) -> bool:
    """Whether two towers are compared with each other, as in CLIP."""
    others = ("get_image_features", "get_audio_features")
    return hasattr(model, "get_text_features") and any(hasattr(model, name) for name in others)


def setting(config: Any, *names: str) -> Any:
    """The first of these that the configuration has, None if there is none."""
    return next((v for v in (getattr(config, name, None) for name in names) if v is not None), None)


def plain(model: Any) -> Any:
    """The transformers model itself, with the layers that PEFT wrapped. PEFT's task classes pass on only the inputs
    of their own task."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def running(unmerged: Any) -> Iterator[None]:
    """Around forwards of the reference alone. InputError where transformers' or PEFT's own code cannot compute it:
    that says nothing about the merged model."""
    try:
        yield
    except MemoryError:
        raise
    except _FAILS as error:
        body, why = plain(unmerged), (str(error).splitlines() or [""])[0]
        raise InputError(
            "the unmerged model does not run here, so there is nothing to compare the merged model with: "
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
