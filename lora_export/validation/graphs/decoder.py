"""An exported decoder under ONNX Runtime, run as a user's program would: with its KV cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.runtime import DecoderSignature, open_session
from lora_export.validation.graphs.run import run_values, value

SPLIT = 3  # a prompt is fed in this many pieces, so that the cache has to carry the context


class OnnxDecoder:
    """One session, and its cache kept as ONNX Runtime values so that no type is converted on the way."""

    def __init__(self, model: Path, provider: str) -> None:
        self._model = model
        self._session = open_session(model, provider)
        self._signature = DecoderSignature.of(self._session)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits (length, vocabulary) of a prompt, fed in up to SPLIT pieces through the KV cache."""
        past, seen, out = self._empty_cache(), 0, []
        for piece in torch.tensor_split(ids, min(SPLIT, len(ids))):
            logits, past = self._step(piece, past, seen)
            seen += len(piece)
            out.append(logits)
        return torch.cat(out)

    def padded_logits(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """fp32 logits (length, vocabulary) of each prompt, all in one batch: what a runtime does with requests of
        several lengths.

        The last token of every prompt is a step of the whole batch from the cache. Padding is on the left, with
        positions to match, where the graph is told positions, as Optimum pads; else on the right, as
        onnxruntime-genai pads, whose attention counts the tokens of each row.
        """
        prompts = [t[:-1] for t in tokens]
        longest, left = max(map(len, prompts)), self._signature.position_ids is not None
        masks = torch.stack([(torch.arange(longest) < len(t)).long() for t in prompts])
        ids = torch.stack([torch.nn.functional.pad(t, (0, longest - len(t))) for t in prompts])
        if left:
            ids = torch.stack([x.roll(longest - len(t)) for x, t in zip(ids, prompts, strict=True)])
            masks = masks.flip(1)
        first, past = self._run(ids, masks, self._empty_cache(len(tokens)), (masks.cumsum(1) - 1).clamp_min(0))
        one = torch.ones(len(tokens), 1, dtype=torch.long)
        grown = torch.cat([masks, one] if left else [one, masks], 1)
        last = torch.stack([t[-1:] for t in tokens])
        step, _ = self._run(last, grown, past, torch.tensor([[len(t)] for t in prompts]))
        rows = [x[longest - len(t) :] if left else x[: len(t)] for x, t in zip(first, prompts, strict=True)]
        return [torch.cat(parts) for parts in zip(rows, step, strict=True)]

    def greedy(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """`count` greedy tokens after the prompt, one at a time, shape (count,)."""
        logits, past = self._step(ids, self._empty_cache(), 0)
        out, seen = [logits[-1].argmax()], len(ids)
        while len(out) < count:
            logits, past = self._step(out[-1][None], past, seen)
            seen += 1
            out.append(logits[-1].argmax())
        return torch.stack(out)

    def _step(self, ids: torch.Tensor, past: list[Any], seen: int) -> tuple[torch.Tensor, list[Any]]:
        mask = torch.ones(1, seen + len(ids), dtype=torch.long)
        logits, present = self._run(ids[None], mask, past, torch.arange(seen, seen + len(ids))[None])
        return logits[0], present

    def _run(
        self, ids: torch.Tensor, mask: torch.Tensor, past: list[Any], positions: torch.Tensor
    ) -> tuple[torch.Tensor, list[Any]]:
        """fp32 logits (batch, length, vocabulary) of ids (batch, length), and the cache after them.

        mask: (batch, tokens in the cache + length); positions: of the ids, (batch, length).
        """
        signature = self._signature
        feeds = {signature.input_ids: value(ids.numpy().astype(signature.ids_dtype))}
        if signature.attention_mask:
            feeds[signature.attention_mask] = value(mask.numpy().astype(signature.ids_dtype))
        if signature.position_ids:
            feeds[signature.position_ids] = value(positions.numpy().astype(signature.ids_dtype))
        feeds |= dict(zip([n for pair in signature.past for n in pair], past, strict=True))
        names = [signature.logits, *(n for pair in signature.present for n in pair)]
        logits, *present = run_values(self._session, names, feeds, self._model)
        return torch.from_numpy(logits.numpy().astype(np.float32)), present

    def _empty_cache(self, rows: int = 1) -> list[Any]:
        signature = self._signature
        empty = np.zeros((rows, signature.kv_heads, 0, signature.head_dim), signature.cache_dtype)
        return [value(empty) for pair in signature.past for _ in pair]
