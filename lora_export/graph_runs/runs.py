"""Runs of graphs. Values remain ONNX Runtime's own from one run to the next, so that no type is converted."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_export.errors import RuntimeUnavailable
from lora_export.graph_runs.feeds import completed
from lora_export.graph_runs.signature import AUDIO, ENCODER_MASK, IDS, LOGITS, MASK, Array, Signature, read_as
from lora_export.runtime import open_session, session_options

if TYPE_CHECKING:
    import onnxruntime

Values = dict[str, Any]  # name → array or OrtValue


def to_numpy(value: "onnxruntime.OrtValue", dtype: "np.dtype[Any]") -> Array:
    """A copy of an OrtValue's numbers. dtype: numpy_dtype of its type.

    OrtValue.numpy() does not know bfloat16; such a value must be on the CPU.
    """
    if dtype.name != "bfloat16":
        return np.asarray(value.numpy())
    size = value.tensor_size_in_bytes()
    raw = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return np.frombuffer(raw, dtype).reshape(value.shape()).copy()


class GraphRun:
    """A graph in a session. provider: cpu, cuda or tensorrt; packed: whether weights are copied into the order in
    which products read them, which many runs gain from, and a few do not; threads: None for all cores."""

    def __init__(self, path: Path, provider: str = "cpu", packed: bool = True, threads: int | None = None) -> None:
        options = session_options()
        options.intra_op_num_threads = threads or 0
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        self.session = open_session(path, provider, options=options)
        self.signature = Signature.of_session(self.session)
        self._path = path

    def arrays(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs as numpy arrays. Entries of `feed` that the graph does not read are ignored."""
        names = list(self.signature.outputs)
        read = {name: feed[name] for name in self.signature.inputs if name in feed}
        return dict(zip(names, self.session.run(names, read), strict=True))

    def values(self, feed: Values) -> Values:
        """All outputs as OrtValues. RuntimeUnavailable, naming the graph, if the provider cannot run it."""
        import onnxruntime as ort

        made = ort.OrtValue.ortvalue_from_numpy
        given = {name: made(v) if isinstance(v, np.ndarray) else v for name, v in feed.items()}
        names = list(self.signature.outputs)
        try:
            return dict(zip(names, self.session.run_with_ort_values(names, given), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no base but this one
            raise RuntimeUnavailable(
                f"the exported graph fails when it runs: {' '.join(str(error).split())}",
                where=self._path,
                expected="a graph that the execution provider can run",
                next_step="another --precision or --provider",
            ) from None


@dataclass(frozen=True)
class State:
    """What a decoder has seen: values, by the names that the next step reads, and the number of tokens."""

    values: Values = field(default_factory=dict)
    seen: int = 0


class Decoder:
    """A decoder that runs step by step, as in a user's program. first, later: the graphs of the first step and of
    all others, which may be the same."""

    def __init__(self, first: GraphRun, later: GraphRun) -> None:
        self._first, self._later = first, later

    @property
    def signature(self) -> Signature:
        return self._first.signature

    def step(self, ids: Array, state: State, **given: Array) -> tuple[Array, State]:
        """fp32 logits (rows, length, vocabulary) of ids (rows, length), and the state after them.

        given: inputs that do not simply follow from the ids: an attention_mask (rows, tokens so far), position_ids.
        """
        run = self._later if state.seen else self._first
        feed = completed(run.signature, {**state.values, IDS: ids, **given}, state.seen)
        outputs = run.values(feed)
        logits = to_numpy(outputs.pop(LOGITS), run.signature.outputs[LOGITS].dtype).astype(np.float32, copy=False)
        continued = {read_as(name): value for name, value in outputs.items()}
        return logits, State({**state.values, **continued}, state.seen + ids.shape[1])


class EncoderDecoder(Decoder):
    """graphs: the encoder's, the decoder's, and the decoder's with a cache if that is another: Optimum's three or
    onnxruntime-genai's two."""

    def __init__(self, graphs: Sequence[Path], provider: str, threads: int | None = None) -> None:
        self._encoder, first, *later = (GraphRun(graph, provider, threads=threads) for graph in graphs)
        super().__init__(first, later[-1] if later else first)

    def encode(self, inputs: Mapping[str, Array]) -> State:
        """The state before the first step. inputs: what the encoder reads, by transformers' names."""
        first = next(iter(inputs.values()))
        given = {AUDIO: first, MASK: np.ones(first.shape[:2], np.int64), **inputs}
        outputs = self._encoder.values(completed(self._encoder.signature, given))
        return State({ENCODER_MASK: given[MASK], **{read_as(name): value for name, value in outputs.items()}})
