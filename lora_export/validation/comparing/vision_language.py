"""How a model that reads pictures among its tokens is compared: as a decoder, given the pictures of each text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_export.contracts import ValidationResult
from lora_export.validation.comparing.decoder import DecoderComparison
from lora_export.validation.comparing.tested_model import plain, takes
from lora_export.validation.graphs.seeing import OnnxVisionLanguage


class Pictures(Protocol):
    """placeholder: the id for each token of a picture; merge: as in graph_runs.VisionLanguage; whole: whether the
    tokens of a picture see each other, so that a decoder has to get all of them in one step."""

    @property
    def placeholder(self) -> int: ...
    @property
    def merge(self) -> int: ...
    @property
    def whole(self) -> bool: ...

    def of(self, ids: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What the model reads of the pictures whose placeholders are among ids."""


@dataclass(kw_only=True)
class VisionLanguageComparison(DecoderComparison):
    """pictures: those of the texts."""

    pictures: Pictures

    INPUTS = "prompts with pictures"

    @property
    def windows(self) -> Any:
        """The prompts: what an adapter changes in the vision tower shows only with pictures."""
        return self.tokens

    def measure(self, unmerged: Any) -> None:
        see(plain(unmerged), self.pictures)
        super().measure(unmerged)

    @property
    def _given(self) -> Mapping[str, object]:
        return {**super()._given, "pictures": [dict(self.pictures.of(ids)) for ids in self.tokens]}

    def judge(self, merged: Any) -> ValidationResult:
        see(plain(merged), self.pictures)
        return super().judge(merged)

    def once(self, model: Any) -> Any:
        see(plain(model), self.pictures)
        return super().once(model)

    def _compared(self, unmerged: Any, merged: Any) -> ValidationResult:
        see(plain(merged), self.pictures)
        return super()._compared(unmerged, merged)

    def _outputs(self, model: Any, first: int | None = None) -> Iterator[torch.Tensor]:
        see(plain(model), self.pictures)
        return super()._outputs(model, first)

    def _guess(self, model: Any, count: int) -> Sequence[torch.Tensor | None]:
        """None: the pictures of several texts are not put into one batch."""
        return [None] * len(self._prompts)

    def _session(self, paths: tuple[Path, ...], provider: str) -> Any:
        return OnnxVisionLanguage(paths, provider, self.pictures)


def see(body: Any, pictures: Pictures) -> None:
    """Let the forward of a transformers model get the pictures that belong to its ids, if it does not yet.

    A model never writes a placeholder: its logit becomes the smallest one, so that greedy texts have none.
    """
    if getattr(body, "_sees", None) is not pictures:
        body._sees = pictures
        body.register_forward_pre_hook(_look, with_kwargs=True)
        body.register_forward_hook(_speak)


def _look(body: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    past = given.get("past_key_values")
    if past is not None and past.get_seq_length():
        return args, given
    ids = given["input_ids"]
    seen, kinds = body._sees.of(ids), (ids == body._sees.placeholder).long()
    more: dict[str, Any] = dict(seen)
    if "token_type_ids" in takes(body):
        more["token_type_ids"] = kinds
    if hasattr(body.model, "get_rope_index"):
        grids = {k: v for k, v in seen.items() if k.endswith("grid_thw")}
        more["position_ids"], body.model.rope_deltas = body.model.get_rope_index(
            ids, mm_token_type_ids=kinds, **grids
        )
        more["mm_token_type_ids"] = kinds
    return args, {**given, **more}


def _speak(body: Any, args: Any, result: Any) -> None:
    silence(result.logits, body._sees.placeholder)


def silence(logits: torch.Tensor, placeholder: int) -> None:
    """Let the logit of the placeholder be the smallest of each position."""
    logits[..., placeholder] = logits.amin(-1)
