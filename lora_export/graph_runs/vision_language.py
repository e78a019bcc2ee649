"""Running a vision-language model's three graphs, as a user's program does: features, embeddings, then the decoder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_export.graph_runs.feeds import completed
from lora_export.graph_runs.runs import GraphRun, State, to_numpy
from lora_export.graph_runs.signature import EMBEDS, GRIDS, IDS, LOGITS, MASK, POSITIONS, Array, read_as

_TIME_HEIGHT_WIDTH = 3


class VisionLanguage:
    """graphs: pictures to features, ids to rows of embeddings, and the decoder; placeholder: the id that stands for
    each token of a picture; merge: patches along a side of what becomes one token, where pictures have grids."""

    def __init__(self, graphs: Sequence[Path], provider: str, placeholder: int, merge: int = 1) -> None:
        self._vision, self._embedding, self._decoder = (GraphRun(graph, provider) for graph in graphs)
        self._placeholder, self._merge = placeholder, merge

    def rows(self, ids: Array, seen: Mapping[str, Array]) -> Array:
        """What the decoder reads of ids (rows, length): embeddings, with the pictures' features in their places."""
        rows = self._embedding.arrays({IDS: ids.astype(np.int64)})["inputs_embeds"].copy()
        if seen:
            given = {_named(self._vision, name): value for name, value in seen.items()}
            rows[ids == self._placeholder] = self._vision.arrays(given)["image_features"]
        return rows

    def positions(self, ids: Array, seen: Mapping[str, Array]) -> Array:
        """Of one text (length,) from 0: (1, length), or (3, 1, length) where pictures are placed in time, height and
        width, and the text behind them goes on from the largest of the three."""
        if len(self._decoder.signature.inputs[POSITIONS].shape) < _TIME_HEIGHT_WIDTH:
            return np.arange(len(ids))[None]
        grids = iter(next((seen[name] for name in GRIDS if name in seen), np.zeros((0, 3), np.int64)))
        made, at, start = [], 0, 0
        while at < len(ids):
            if ids[at] != self._placeholder:
                made.append(np.full((3, 1), start))
                at, start = at + 1, start + 1
                continue
            time, height, width = (int(n) for n in next(grids) // (1, self._merge, self._merge))
            made.append(start + np.indices((time, height, width)).reshape(3, -1))
            at, start = at + time * height * width, start + max(height, width)
        return np.concatenate(made, 1)[:, None]

    def step(self, rows: Array, mask: Array, positions: Array, state: State) -> tuple[Array, State]:
        """fp32 logits (rows, length, vocabulary), and the state after rows (rows, length, width)."""
        given = {**state.values, EMBEDS: rows, MASK: mask, POSITIONS: positions}
        outputs = self._decoder.values(completed(self._decoder.signature, given, state.seen))
        logits = to_numpy(outputs.pop(LOGITS), self._decoder.signature.outputs[LOGITS].dtype).astype(np.float32)
        continued = {read_as(name): value for name, value in outputs.items()}
        return logits, State(continued, state.seen + rows.shape[1])


def _named(run: GraphRun, name: str) -> str:
    """The graph's name of an input: runtimes have two for the grids."""
    return next(n for n in GRIDS if n in run.signature.inputs) if name in GRIDS else name
