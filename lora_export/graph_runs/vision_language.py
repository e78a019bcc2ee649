"""Running a vision-language model's three graphs, as a user's program does: features, rows of inputs, decoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_export.graph_runs.feeds import completed
from lora_export.graph_runs.runs import GraphRun, State, to_numpy
from lora_export.graph_runs.signature import (
    EMBEDS,
    GRIDS,
    IDS,
    LOGITS,
    MASK,
    PIXELS,
    POSITIONS,
    Array,
    Signature,
    read_as,
)

_TIME_HEIGHT_WIDTH = 3


class VisionLanguage:
    """graphs: pictures to features, ids to rows of embeddings, and the decoder; placeholder: the id that stands for
    each token of a picture; merge: patches along a side of what becomes one token, where pictures have grids."""

    def __init__(
        self, graphs: Sequence[Path], provider: str, placeholder: int, merge: int = 1, threads: int | None = None
    ) -> None:
        self._vision, self._embedding, self._decoder = (GraphRun(g, provider, threads=threads) for g in graphs)
        self._placeholder, self._merge = placeholder, merge

    def rows(self, ids: Array, seen: Mapping[str, Array]) -> Array:
        """What the decoder reads of ids (rows, length): embeddings, with the pictures' features in their places."""
        rows = self._embedding.arrays({IDS: ids.astype(np.int64)})["inputs_embeds"].copy()
        if seen:
            parts = [self._vision.arrays(given) for given in for_graph(self._vision.signature, seen)]
            rows[ids == self._placeholder] = np.concatenate([part["image_features"] for part in parts])
        return rows

    def positions(self, ids: Array, seen: Mapping[str, Array]) -> Array:
        """Of one text (length,) from 0: (1, length), or (3, 1, length): time, height and width of pictures."""
        if len(self._decoder.signature.inputs[POSITIONS].shape) < _TIME_HEIGHT_WIDTH:
            return np.arange(len(ids))[None]
        return placed(ids, seen, self._placeholder, self._merge)[:, None]

    def step(self, rows: Array, mask: Array, positions: Array, state: State) -> tuple[Array, State]:
        """fp32 logits (rows, length, vocabulary), and the state after rows (rows, length, width)."""
        given = {**state.values, EMBEDS: rows, MASK: mask, POSITIONS: positions}
        outputs = self._decoder.values(completed(self._decoder.signature, given, state.seen))
        logits = to_numpy(outputs.pop(LOGITS), self._decoder.signature.outputs[LOGITS].dtype).astype(np.float32)
        continued = {read_as(name): value for name, value in outputs.items()}
        return logits, State(continued, state.seen + rows.shape[1])


def placed(ids: Array, seen: Mapping[str, Array], placeholder: int, merge: int) -> Array:
    """Positions (3, length) of a text's tokens in time, height and width: those of a picture lie in its grid, and
    the text behind it goes on from the largest of the three."""
    grids = iter(next((seen[name] for name in GRIDS if name in seen), np.zeros((0, 3), np.int64)))
    made, at, start = [np.zeros((3, 0), np.int64)], 0, 0
    while at < len(ids):
        if ids[at] != placeholder:
            made.append(np.full((3, 1), start))
            at, start = at + 1, start + 1
            continue
        time, height, width = (int(n) for n in next(grids) // (1, merge, merge))
        made.append(start + np.indices((time, height, width)).reshape(3, -1))
        at, start = at + time * height * width, start + max(height, width)
    return np.concatenate(made, 1)


def for_graph(vision: Signature, seen: Mapping[str, Array]) -> list[dict[str, Array]]:
    """What the graph of a vision tower is given, under its own names: all pictures together, or one after another
    where it takes one of any size."""
    given = {next(n for n in GRIDS if n in vision.inputs) if k in GRIDS else k: v for k, v in seen.items()}
    if vision.inputs[PIXELS].shape[0] != 1:
        return [given]
    return [{k: v[i : i + 1] for k, v in given.items()} for i in range(len(given[PIXELS]))]
