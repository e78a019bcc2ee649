"""Exported graphs in ONNX Runtime, run as in a user's program, on PyTorch tensors."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export.graph_runs.feeds import completed
from lora_export.graph_runs.runs import Decoder, EncoderDecoder, GraphRun, State
from lora_export.graph_runs.signature import POSITIONS, Array

SPLIT = 3  # pieces of a prompt, so that the cache has to carry the context
STEPS = 2  # tokens at the end of a text that the decoder gets one at a time


class OnnxDecoder:
    """One session and its KV cache."""

    def __init__(self, model: Path, provider: str) -> None:
        run = GraphRun(model, provider, threads=torch.get_num_threads())
        run.signature.require_cache()
        self._decoder = Decoder(run, run)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits (length, vocabulary) of a prompt, fed in up to SPLIT pieces through the KV cache."""
        state, out = State(), []
        for piece in torch.tensor_split(ids, min(SPLIT, len(ids))):
            logits, state = _step(self._decoder, piece[None], state)
            out.append(logits[0])
        return torch.cat(out)

    @property
    def equal_rows(self) -> bool:
        """Whether the rows of a batch must be equally long: the builder's states go through the padding at the end
        of a row."""
        return any(name.startswith("past.") for name in self._decoder.signature.inputs)

    def padded_logits(self, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """fp32 logits (length, vocabulary) of each prompt, all in one batch: what a runtime does with requests of
        several lengths.

        The last token of every prompt is a step of the whole batch from the cache. Padding is on the left, with
        positions to match, where the graph reads positions, as Optimum pads; else on the right, as
        onnxruntime-genai pads, whose attention counts the tokens of each row.
        """
        prompts = [t[:-1] for t in tokens]
        longest, left = max(map(len, prompts)), POSITIONS in self._decoder.signature.inputs
        masks = torch.stack([(torch.arange(longest) < len(t)).long() for t in prompts])
        ids = torch.stack([torch.nn.functional.pad(t, (0, longest - len(t))) for t in prompts])
        if left:
            ids = torch.stack([x.roll(longest - len(t)) for x, t in zip(ids, prompts, strict=True)])
            masks = masks.flip(1)
        positions = (masks.cumsum(1) - 1).clamp_min(0)
        first, state = _step(self._decoder, ids, State(), attention_mask=masks, position_ids=positions)
        one = torch.ones(len(tokens), 1, dtype=torch.long)
        grown = torch.cat([masks, one] if left else [one, masks], 1)
        last, lengths = torch.stack([t[-1:] for t in tokens]), torch.tensor([[len(t)] for t in prompts])
        step, _ = _step(self._decoder, last, state, attention_mask=grown, position_ids=lengths)
        rows = [x[longest - len(t) :] if left else x[: len(t)] for x, t in zip(first, prompts, strict=True)]
        return [torch.cat(parts) for parts in zip(rows, step, strict=True)]

    def greedy(self, prompts: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
        """`count` greedy tokens after each prompt, one at a time, shape (count,).

        The first prompt is alone; of the others those of one length are rows of a batch.
        """
        texts: dict[int, torch.Tensor] = {}
        for together in ([0], *_of_one_length(prompts, range(1, len(prompts)))):
            rows = _greedy(self._decoder, torch.stack([prompts[at] for at in together]), State(), count)
            texts.update(zip(together, rows, strict=True))
        return [texts[at] for at in range(len(prompts))]


class OnnxSeq2Seq:
    """graphs: the encoder's, the decoder's, and the decoder's with a cache if that is another."""

    def __init__(self, graphs: Sequence[Path], provider: str) -> None:
        self._runs = EncoderDecoder(graphs, provider, torch.get_num_threads())

    def logits(self, inputs: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """fp32 logits (length, vocabulary) of one row of inputs, the decoder given `ids` (length,)."""
        state, out = self._encode(inputs), []
        for piece in (ids[:-STEPS], *torch.split(ids[-STEPS:], 1)):
            if len(piece):
                logits, state = _step(self._runs, piece[None], state)
                out.append(logits[0])
        return torch.cat(out)

    def greedy(self, inputs: Mapping[str, torch.Tensor], start: torch.Tensor, count: int) -> torch.Tensor:
        """`count` greedy tokens for each row of inputs, shape (rows, count); start: the first token (1,)."""
        rows = len(next(iter(inputs.values())))
        return _greedy(self._runs, start.expand(rows, 1), self._encode(inputs), count)

    def _encode(self, inputs: Mapping[str, torch.Tensor]) -> State:
        return self._runs.encode({name: value.numpy() for name, value in inputs.items()})


class OnnxEncoder:
    """A model that does not generate. Inputs that a batch lacks get the defaults of transformers."""

    def __init__(self, model: Path, provider: str) -> None:
        self._run = GraphRun(model, provider, threads=torch.get_num_threads())

    def outputs(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """All outputs of each batch by name, in fp32."""
        return [
            {name: torch.from_numpy(value.astype(np.float32)) for name, value in self._answer(batch).items()}
            for batch in batches
        ]

    def _answer(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        given = {name: value.numpy() for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return self._run.arrays(completed(self._run.signature, given))


def _of_one_length(prompts: Sequence[torch.Tensor], which: Iterable[int]) -> Iterable[list[int]]:
    """Indices of prompts, those that are equally long together."""
    groups: dict[int, list[int]] = {}
    for at in which:
        groups.setdefault(len(prompts[at]), []).append(at)
    return groups.values()


def _step(decoder: Decoder, ids: torch.Tensor, state: State, **given: torch.Tensor) -> tuple[torch.Tensor, State]:
    """fp32 logits (rows, length, vocabulary) of ids (rows, length), and the state after them."""
    logits, state = decoder.step(ids.numpy(), state, **{name: value.numpy() for name, value in given.items()})
    return torch.from_numpy(logits), state


def _greedy(decoder: Decoder, ids: torch.Tensor, state: State, count: int) -> torch.Tensor:
    """`count` greedy tokens for each row behind ids (rows, length), shape (rows, count)."""
    out = []
    for _ in range(count):
        logits, state = _step(decoder, ids, state)
        ids = logits[:, -1:].argmax(-1)
        out.append(ids)
    return torch.cat(out, 1)
