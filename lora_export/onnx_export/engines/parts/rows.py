"""What a decoder reads for each token of a text with pictures: the embedding, and what else the model wants to know."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.onnx_export.engines.parts.graph_part import takes


@dataclass(frozen=True)
class Rows:
    """size: of an embedding; marked: whether a column tells pictures from text, for masks in which a picture sees
    itself in both directions; axes: of the positions of a token (3: time, height and width)."""

    size: int
    marked: bool
    axes: int

    @classmethod
    def of(cls, model: Any) -> "Rows":
        config = model.config.get_text_config(decoder=True)
        rope = getattr(config, "rope_parameters", None) or {}
        axes = 3 if "mrope_section" in rope or "get_rope_index" in dir(model.model) else 1
        return cls(config.hidden_size, takes(model, "token_type_ids"), axes)

    @property
    def width(self) -> int:
        return self.size + self.marked

    def of_texts(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(batch, length, size) → (batch, length, width)."""
        return torch.nn.functional.pad(embeddings, (0, self.width - self.size))

    def of_pictures(self, features: torch.Tensor) -> torch.Tensor:
        """(tokens, size) → (tokens, width)."""
        return torch.nn.functional.pad(features, (0, 1), value=1.0) if self.marked else features

    @contextlib.contextmanager
    def inside(
        self, model: Any, rows: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Inputs of the model's forward for rows (batch, length, width)."""
        given = {"inputs_embeds": rows[..., : self.size], "attention_mask": mask}
        if self.marked:
            kinds = (rows[..., self.size] > 0.5).long()
            past = mask.shape[1] - rows.shape[1]
            given["token_type_ids"] = torch.cat([kinds.new_zeros((kinds.shape[0], past)), kinds], 1)
        yield given
