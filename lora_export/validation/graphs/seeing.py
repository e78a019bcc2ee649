"""A vision-language model's graphs in ONNX Runtime, on texts with pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.graph_runs.runs import State
from lora_export.graph_runs.signature import Array
from lora_export.graph_runs.vision_language import VisionLanguage

SPLIT = 3  # pieces of a prompt, so that the cache has to carry the context


class OnnxVisionLanguage:
    """pictures: as in VisionLanguageComparison."""

    equal_rows = False

    def __init__(self, graphs: Sequence[Path], provider: str, pictures: Any) -> None:
        self._runs = VisionLanguage(graphs, provider, pictures.placeholder, pictures.merge, torch.get_num_threads())
        self._pictures = pictures

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits (length, vocabulary) of a prompt, fed in up to SPLIT pieces through the cache."""
        rows, positions = self._read(ids)
        state, out, at = State(), [], 0
        for size in self._pieces(ids):
            logits, state = self._step(rows[:, at : at + size], positions[..., at : at + size], state)
            out.append(logits[0])
            at += size
        return torch.cat(out)

    def padded_logits(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same of each prompt, in one batch with padding on the left; the last token is a step of its own."""
        read = [self._read(ids) for ids in tokens]
        longest = max(map(len, tokens))
        left = [longest - len(ids) for ids in tokens]
        rows = np.concatenate([np.pad(r, ((0, 0), (n, 0), (0, 0))) for (r, _), n in zip(read, left, strict=True)])
        shifted = [np.pad(p, (*[(0, 0)] * (p.ndim - 1), (n, 0))) for (_, p), n in zip(read, left, strict=True)]
        positions = np.concatenate(shifted, -2)
        mask = np.stack([np.arange(longest) >= n for n in left]).astype(np.int64)
        first, state = self._step(rows[:, :-1], positions[..., :-1], State(), mask[:, :-1])
        last, _ = self._step(rows[:, -1:], positions[..., -1:], state, mask)
        return [torch.cat([a[n:], b]) for a, b, n in zip(first, last, left, strict=True)]

    def greedy(self, prompts: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
        """`count` greedy tokens after each prompt, one at a time, shape (count,)."""
        return [self._continued(ids, count) for ids in prompts]

    def _continued(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        rows, positions = self._read(ids)
        logits, state = self._step(rows, positions, State())
        out = []
        for _ in range(count):
            token = logits[0, -1:].argmax(-1)
            out.append(token)
            positions = positions.max(-1, keepdims=True).max(0, keepdims=True).repeat(len(positions), 0) + 1
            logits, state = self._step(self._runs.rows(token.numpy()[None], {}), positions, state)
        return torch.cat(out)

    def _read(self, ids: torch.Tensor) -> tuple[Array, Array]:
        """The rows (1, length, width) and the positions of a text."""
        seen = {name: value.numpy() for name, value in self._pictures.of(ids).items()}
        return self._runs.rows(ids.numpy()[None], seen), self._runs.positions(ids.numpy(), seen)

    def _pieces(self, ids: torch.Tensor) -> list[int]:
        """Sizes of the steps; none ends inside of a picture whose tokens see each other."""
        places = (ids == self._pictures.placeholder).nonzero()
        fixed = int(places[-1]) + 1 if len(places) and self._pictures.whole else 0
        rest = [len(part) for part in torch.tensor_split(ids[fixed:], min(SPLIT, len(ids) - fixed))]
        return [fixed + rest[0], *rest[1:]]

    def _step(
        self, rows: Array, positions: Array, state: State, mask: Array | None = None
    ) -> tuple[torch.Tensor, State]:
        if mask is None:
            mask = np.ones((len(rows), state.seen + rows.shape[1]), np.int64)
        logits, state = self._runs.step(rows, mask, positions, state)
        made = torch.from_numpy(logits)
        made[..., self._pictures.placeholder] = made.amin(-1)  # a placeholder is never written
        return made, state
