"""What a decoder reads for each token of a text with pictures: the embedding, and what else it wants to know."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from lora_export.onnx_export.engines.parts.graph_part import takes

# In training the answer is a suffix; what comes with an empty cache is the prompt.
_PREFIX = frozenset({"paligemma"})


@dataclass(frozen=True)
class Rows:
    """size: of an embedding; inner: how many layers get features of their own added behind them (DeepStack);
    marked: whether a column tells pictures from text, for masks in which a picture sees itself in both directions;
    prefix: whether the whole prompt sees itself so; axes: of the positions of a token (3: time, height, width)."""

    size: int
    inner: int
    marked: bool
    prefix: bool
    axes: int

    @classmethod
    def of(cls, model: Any) -> "Rows":
        config, vision = model.config.get_text_config(decoder=True), model.config.vision_config
        inner = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        axes = 3 if hasattr(model.model, "get_rope_index") else 1
        typed, prefix = takes(model, "token_type_ids"), model.config.model_type in _PREFIX
        return cls(config.hidden_size, inner, typed and not prefix, prefix, axes)

    @property
    def width(self) -> int:
        return self.size * (1 + self.inner) + self.marked

    def of_texts(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(batch, length, size) → (batch, length, width)."""
        return torch.nn.functional.pad(embeddings, (0, self.width - self.size))

    def of_pictures(self, features: torch.Tensor) -> torch.Tensor:
        """(tokens, size of all features) → (tokens, width)."""
        return torch.nn.functional.pad(features, (0, 1), value=1.0) if self.marked else features

    @contextlib.contextmanager
    def inside(
        self, model: Any, rows: torch.Tensor, mask: torch.Tensor, cache: Any
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Inputs of the model's forward for rows (batch, length, width), while the inner features are added."""
        given = {"inputs_embeds": rows[..., : self.size], "attention_mask": mask}
        if self.marked:
            kinds = (rows[..., -1] > 0.5).long()
            past = mask.shape[1] - rows.shape[1]
            given["token_type_ids"] = torch.cat([kinds.new_zeros((kinds.shape[0], past)), kinds], 1)
        with contextlib.ExitStack() as stack:
            if self.prefix:
                given["token_type_ids"] = _after_prompt(rows, mask)
                stack.enter_context(mock.patch.object(type(cache), "is_initialized", False))
            for i in range(self.inner):
                own = rows[..., self.size * (1 + i) : self.size * (2 + i)]
                layer = model.model.language_model.layers[i]
                handle = layer.register_forward_hook(lambda _, __, states, own=own: states + own)
                stack.callback(handle.remove)
            yield given


def _after_prompt(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch, all tokens so far): 0 if they are the prompt, 1 if the cache has tokens already.

    The count is computed from a tensor: as a number, it would be that of the trace.
    """
    before = torch.ones((1, mask.shape[1] - rows.shape[1]), dtype=torch.int64).sum(1, keepdim=True)
    return before.clamp(max=1).expand(mask.shape)
