"""An export of a model with one forward and the model itself, on inputs of shapes that were not traced."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.contracts import ExportResult
from tests.onnx_export import runs
from tests.onnx_export.conftest import VOCABULARY

BATCHES = ((1, 5), (3, 12), (2, 17))  # texts: rows, tokens
END = 2  # the end of a text, which some models look for


@dataclass(frozen=True)
class Shapes:
    """pictures: heights and widths where they are dynamic; sounds: samples, frames: of spectra, likewise; given:
    what else the model is called with."""

    pictures: tuple[tuple[int, int], ...] = ((96, 64), (64, 128), (128, 160))
    sounds: tuple[int, ...] = (3200, 7680, 10_900)
    frames: tuple[int, ...] = (64, 96, 150)
    given: tuple[tuple[str, Any], ...] = ()

    def __call__(self, result: ExportResult, model: Any) -> float:
        """The largest difference over the largest value of the same output, over all shapes."""
        if result.kind != "encoder":
            return runs.worst(result, model)
        return max(runs._relative(a, b) for a, b in self._pairs(result, model))

    @torch.no_grad()
    def _pairs(self, result: ExportResult, model: Any) -> Iterator[tuple[torch.Tensor, Any]]:
        session = runs.session(result.model)
        for at in range(len(BATCHES)):
            feeds = self._feeds(session, model, at)
            expected = model(**feeds, **dict(self.given))
            arrays = {name: value.numpy() for name, value in feeds.items()}
            outputs = [o.name for o in session.get_outputs()]
            for name, value in zip(outputs, session.run(outputs, arrays), strict=True):
                yield _where_valid(expected[name], value, feeds.get("attention_mask"))

    def _feeds(self, session: Any, model: Any, at: int) -> dict[str, torch.Tensor]:
        batch, length = BATCHES[at]
        axes = {
            "batch_size": batch, "text_batch_size": batch, "image_batch_size": batch + 1, "num_choices": 2 + at,
            "sequence_length": length, "decoder_sequence_length": length + 2,
            "height": self.pictures[at][0], "width": self.pictures[at][1],
        }  # fmt: skip
        names = {i.name for i in session.get_inputs()}
        if "input_values" in names:
            axes["sequence_length"] = self.sounds[at]
        if "input_features" in names:
            axes["sequence_length"] = self.frames[at]
        generator = torch.Generator().manual_seed(at)
        return {
            i.name: _value(i.name, [d if isinstance(d, int) else axes[d] for d in i.shape], model, generator)
            for i in session.get_inputs()
        }


def _value(name: str, shape: list[int], model: Any, generator: torch.Generator) -> torch.Tensor:
    if name in ("input_ids", "decoder_input_ids"):
        ids = torch.randint(4, VOCABULARY, shape, generator=generator)
        ids[..., -1] = END
        return ids
    if name == "attention_mask":  # rows of different lengths, padded on the right
        rows = torch.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1)
        lengths = (shape[-1] - rows * max(2, shape[-1] // 8)).clamp(min=2)
        return (torch.arange(shape[-1]) < lengths).long()
    if name == "token_type_ids":
        return (torch.arange(shape[-1]) % 2).expand(shape).contiguous()
    if name == "bbox":
        most = getattr(model.config, "max_2d_position_embeddings", 1024)
        boxes = torch.randint(0, most, (*shape[:-1], 2, 2), generator=generator).sort(dim=-2).values
        return boxes.reshape(shape)
    if name == "pixel_mask":
        mask = torch.ones(shape, dtype=torch.int64)
        mask[-1, -shape[1] // 4 :] = 0
        return mask
    return torch.randn(shape, generator=generator)


def _where_valid(wanted: torch.Tensor, found: Any, mask: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Both without what stands at padding, which is nobody's business."""
    if mask is None or wanted.shape[: mask.dim()] != mask.shape:
        return wanted, found
    keep = mask.reshape(*mask.shape, *[1] * (wanted.dim() - mask.dim()))
    return wanted * keep, found * keep.numpy()


worst = Shapes()
