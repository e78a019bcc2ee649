"""A PyTorch model with the weights that an exported graph contains: what the graph should compute.

The weights are first compared with those they were made of. So a graph is proven in two steps: its weights one by
one, and its arithmetic against PyTorch with exactly these weights.
"""

import contextlib
import copy
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora_export.contracts import Check
from lora_export.errors import ExportError
from lora_export.sentence_modules import weight_files
from lora_export.storage.sealed import read_json
from lora_export.validation.comparing import sentence
from lora_export.validation.comparing.tested_model import plain
from lora_export.validation.graphs import weights as graph_weights
from lora_export.validation.graphs.moments import Moments
from lora_export.validation.graphs.numbers import Expected, judged, of_base, saved_whole
from lora_export.validation.graphs.stated import Stated
from lora_export.validation.graphs.weights import Held
from lora_export.validation.reference import loading, streaming

SHARD = 2**30  # bytes of tensors that are held before they are written
HEAD = "output_head"


@dataclass
class GraphModel:
    """model: in fp32; wrong: tensors whose values in the graph are not those of the checkpoint; unchecked: tensors
    without a counterpart; checked: how many had one; moments, stated: what lies beside the graph; same: all numbers
    are those of the checkpoint, bit for bit, and no `model` was made."""

    model: Any
    moments: Moments | None = None
    stated: Stated | None = None
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    checked: int = 0
    same: bool = False

    def checks(self, prefix: str, of: str) -> list[Check]:
        """Of the numbers in the data files, and of what the export says of their errors."""
        said = [] if self.stated is None else [self.stated.check(f"{prefix}quantization_errors")]
        return [self.check(f"{prefix}weight_errors", of), *said]

    def judge(
        self,
        held: Held,
        wanted: torch.Tensor | None,
        stored: Mapping[str, torch.dtype] | None,
        same: bool = False,
    ) -> None:
        """wanted: what the piece should be, None if unknown; stored, same: as in `judged`."""
        found = None
        if wanted is None:
            self.unchecked.append(held.tensor)
        else:
            self.checked += 1
            error, found = judged(held, wanted, stored, self.moments, same)
            if not error <= 1:
                self.wrong.append(held.tensor)
        if self.stated is not None and held.quantized is not None:
            self.stated.add(held.quantized, found() if found else None)

    def check(self, name: str, of: str) -> Check:
        """No value of the data files may differ from what it was made of by more than its type explains."""
        note = f"of {self.checked} tensors in the data files, each against {of}"
        if self.wrong:
            note += f"; the first: {self.wrong[0]}"
        if self.unchecked:
            note += f"; {len(self.unchecked)} have no counterpart there"
        return Check(name, len(self.wrong), 0, not self.wrong and self.checked > 0, note)


@contextlib.contextmanager
def graph_model(
    graphs: Sequence[Path],
    unmerged: Any,
    merged: Path,
    expected: Expected,
    stored: Mapping[str, torch.dtype] | None = None,
    keep: int | None = None,
    answered: bool = False,
) -> Iterator[GraphModel]:
    """The model of an export's graphs, with the class and configuration of the unmerged one.

    merged: a folder whose headers have the checkpoint's names and shapes; expected: the values of a piece, None if
    unknown; stored: None if the graph was made of exactly the `expected` values, else the types that they were
    first rounded to; keep: as in load_unmerged; answered: the model of the `expected` values answers for a graph
    that has exactly them, and no other is made. What the data files do not contain is taken from the unmerged
    model's base.
    """
    shapes = shapes_of(merged)
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        work = Path(scratch)
        beside = graphs[0].parent
        checked_model = GraphModel(None, Moments.beside(beside), Stated.beside(beside))
        writer = Writer(work, shapes)
        looked = answered and _is_plain(beside)
        if looked:
            pieces = Pieces(shapes)
            for held in graph_weights.read(graphs, shapes):
                wanted = expected(held)
                checked_model.judge(held, wanted, stored, pieces.add(held, wanted))
            if pieces.all_same and not weight_files(merged) and _same_settings(unmerged, merged):
                checked_model.same = True
                yield checked_model
                return
        for held in graph_weights.read(graphs, shapes):
            if not looked:
                checked_model.judge(held, expected(held), stored)
            writer.add(held)
        if not checked_model.checked and not checked_model.unchecked:
            raise ExportError(
                "the export holds none of this model's tensors",
                where=graphs[0].parent,
                expected="an export of the merged model",
                next_step="lora-export export -m MERGED -o ONNX",
            )
        head = writer.finish()
        checked_model.model = _load(work, unmerged, merged, head, keep)
        sentence.attach(checked_model.model, merged, writer.under(weight_files(merged)))
        yield checked_model


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= _in_file(file)
    for path, file in weight_files(folder).items():
        shapes |= {f"{path}.{name}": shape for name, shape in _in_file(file).items()}
    return shapes


def _in_file(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="np") as tensors:
        return {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118


def _is_plain(folder: Path) -> bool:
    """Whether the data files of an export hold nothing but fp32 numbers as they are."""
    entries = [e for e in read_json(folder / graph_weights.NAME)["weights"] if e["made_of"]]
    return all(e["dtype"] == "float32" and not e.get("quantized") and not e.get("plus") for e in entries)


_OF_FILES = ("dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version")


def _same_settings(unmerged: Any, merged: Path) -> bool:
    """Whether the merged folder's configuration computes as the unmerged model's does."""
    one, other = (config.to_dict() for config in (plain(unmerged).config, loading.config_of(merged)))
    return bool(_computing(one) == _computing(other))


def _computing(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {name: _computing(value) for name, value in config.items() if name not in _OF_FILES}
    return config


@dataclass
class Pieces:
    """Whether a graph holds each tensor of a checkpoint whole, bit for bit. shapes: of the tensors."""

    shapes: Mapping[str, Sequence[int]]
    _rows: dict[str, dict[int, int]] = field(default_factory=dict)
    _differing: bool = False

    def add(self, held: Held, wanted: torch.Tensor | None) -> bool:
        """Whether this piece is what it should be."""
        same = wanted is not None and wanted.shape == held.values.shape and _same_bits(held.values, wanted)
        self._differing |= not same
        self._rows.setdefault(held.tensor, {})[held.start] = held.stop - held.start
        return same

    @property
    def all_same(self) -> bool:
        rows = {name: sum(parts.values()) for name, parts in self._rows.items()}
        return not self._differing and all(
            rows.get(name) == (shape[0] if shape else 1) for name, shape in self.shapes.items()
        )


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*(values.contiguous().view(torch.int32) for values in (one, other)))


class Writer:
    """Writes checkpoint tensors, assembled from their pieces, into safetensors files of about SHARD bytes."""

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self._folder, self._shapes = folder, shapes
        self._pending: dict[tuple[str, bool], dict[int, Held]] = {}
        self._shard: dict[str, torch.Tensor] = {}
        self._places: dict[str, str] = {}
        self._done: set[tuple[str, bool]] = set()

    def add(self, held: Held) -> None:
        key = held.tensor, held.quantized is not None
        if key in self._done:
            return  # another graph of the export reads the same tensor
        parts = self._pending.setdefault(key, {})
        parts[held.start] = held
        shape = self._shapes[held.tensor]
        if sum(p.stop - p.start for p in parts.values()) == (shape[0] if shape else 1):
            rows = [parts[start].values for start in sorted(parts)]
            self._put(key, (rows[0] if len(rows) == 1 else torch.cat(rows)).reshape(tuple(shape)).contiguous())
            del self._pending[key]

    def _put(self, key: tuple[str, bool], values: torch.Tensor) -> None:
        name, quantized = key
        other = (name, not quantized) in self._done
        self._done.add(key)
        # Of a tied embedding the graph may hold one copy for look-ups and a quantized one for the head.
        if other and quantized:
            self._save({HEAD: values.clone()}, f"{HEAD}.safetensors")
            return
        if other:
            self._promote(name)
        self._shard[name] = values.clone()
        if sum(t.nbytes for t in self._shard.values()) > SHARD:
            self._flush()

    def _promote(self, name: str) -> None:
        """What was taken for the only copy belongs to the head."""
        if name not in self._shard:
            with safe_open(self._folder / self._places[name], framework="pt") as tensors:
                self._shard[name] = tensors.get_tensor(name)
        self._save({HEAD: self._shard.pop(name)}, f"{HEAD}.safetensors")

    def _flush(self) -> None:
        if self._shard:
            file = f"model-{len(set(self._places.values())):05}.safetensors"
            self._save(self._shard, file)
            self._places |= dict.fromkeys(self._shard, file)
            self._shard = {}

    def _save(self, tensors: dict[str, torch.Tensor], file: str) -> None:
        save_file(tensors, self._folder / file, metadata={"format": "pt"})

    def under(self, modules: Collection[str]) -> dict[str, torch.Tensor]:
        """Tensors of these modules. After `finish`."""
        names = [n for n in self._places if n.startswith(tuple(f"{path}." for path in modules))]
        found = {}
        for name in names:
            with safe_open(self._folder / self._places[name], framework="pt") as tensors:
                found[name] = tensors.get_tensor(name)
        return found

    def finish(self) -> torch.Tensor | None:
        """The output head's own values, if it has any."""
        self._flush()
        index = {"metadata": {}, "weight_map": self._places}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        head = self._folder / f"{HEAD}.safetensors"
        if not head.exists():
            return None
        with safe_open(head, framework="pt") as tensors:
            return tensors.get_tensor(HEAD)  # type: ignore[no-any-return]


def _load(work: Path, unmerged: Any, merged: Path, head: torch.Tensor | None, keep: int | None) -> Any:
    body = plain(unmerged)
    config = copy.deepcopy(body.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    together = tied(merged)
    if together is not None:  # a merge unties a head that it changes
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = together
    config.save_pretrained(work)
    model, info = loading.load(type(body), work, torch.float32, keep)
    streaming.attach(model, ())
    fill_from_base(model, info["missing_keys"], unmerged)
    if head is not None:
        output = model.get_output_embeddings()
        output.weight = torch.nn.Parameter(head, requires_grad=False)
    return loading.quiet(model)


def tied(folder: Path) -> Any:
    """Whether head and embedding are one; None where the configuration does not say."""
    return getattr(loading.config_of(folder).get_text_config(), "tie_word_embeddings", None)


def fill_from_base(model: Any, missing: Sequence[str], unmerged: Any) -> None:
    """Parameters and buffers that the data files do not contain (folded away, or zero) are the base's, or the
    adapter's if it saved the whole module."""
    known = of_base(unmerged) | saved_whole(unmerged)
    state = {}
    for name in missing:
        if name in known:
            with streaming.present(known[name]):
                state[name] = known[name].detach().clone()
    model.load_state_dict(state, strict=False)
