"""A PyTorch model with the numbers that an exported graph holds: what the graph has to compute.

The numbers are compared with those that they were made of first. So a graph is proven in two steps: its weights one
by one, and its arithmetic, against PyTorch on just these weights.
"""

import contextlib
import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_export.contracts import Check
from lora_export.validation import graph_weights, loading, streaming
from lora_export.validation.effective import base_layer, plain_parameters, wrapped_modules
from lora_export.validation.graph_weights import Held, Quantized
from lora_export.validation.subject import plain
from lora_export.validation.whole import BLOCK, effective_blocks, whole_probes, wrapped_parameters

SHARD = 2**30  # bytes of tensors that are held before they are written
_HEAD = "output_head"
# How far a number may be from the one that it stands for, in steps of its block: at most, and as a root mean
# square. A symmetric block has a step of 1/2^(bits-1) of its largest number, which may be cut off at the other end;
# a searched scale cuts off a little more. Uniform errors have a root mean square of 1/√12 = 0.29 steps.
STEPS, RMS_STEPS = 1.25, 0.42
# The same for 4-bit types whose codes are not evenly spaced, as shares of the block's largest number: half the
# widest gap, and the root mean square for uniform numbers (0.054, 0.066), which are the worst case in practice.
CODE_GAPS = {"nf4": (0.153, 0.06), "fp4": (0.168, 0.08)}
ARITHMETIC = 2.0**-20  # of the largest weight: what asking a layer for its weights costs in fp32
SCALE_ROUNDING = 2.0**-8  # a scale in bf16 moves every number of its block
Expected = Callable[[Held], torch.Tensor | None]


@dataclass
class GraphModel:
    """model: in fp32; wrong: tensors whose numbers in the graph are not those of the checkpoint; unchecked: tensors
    that had no counterpart; checked: how many had."""

    model: Any
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    checked: int = 0

    def check(self, name: str, of: str) -> Check:
        """No number of the data files may differ from what it was made of by more than its type explains."""
        note = f"of {self.checked} tensors in the data files, each against {of}"
        if self.wrong:
            note += f"; the first: {self.wrong[0]}"
        if self.unchecked:
            note += f"; {len(self.unchecked)} have no counterpart there"
        return Check(name, len(self.wrong), 0, not self.wrong and self.checked > 0, note)


@contextlib.contextmanager
def graph_model(
    folder: Path,
    unmerged: Any,
    merged: Path,
    expected: Expected,
    stored: Mapping[str, torch.dtype] | None = None,
    keep: int | None = None,
) -> Iterator[GraphModel]:
    """The model of an export's folder, of the class and configuration of the unmerged one.

    merged: a folder whose headers have the checkpoint's names and shapes; expected: the numbers of a piece, None
    where there are none; stored: None where `expected` are the very numbers that the graph was made of, else the
    types that they were rounded to before; keep: as of load_unmerged. What the data files do not hold is taken from
    the unmerged model's base.
    """
    shapes = _shapes(merged)
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        work = Path(scratch)
        found = GraphModel(None)
        writer = _Writer(work, shapes)
        for held in graph_weights.read(folder, shapes):
            _judge(held, expected(held), stored, found)
            writer.add(held)
        head = writer.finish()
        found.model = _load(work, unmerged, merged, head, keep)
        yield found


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            shapes |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    return shapes


def numbers_of(folder: Path) -> Expected:
    """The numbers of a checkpoint's files, a piece at a time, in fp32."""
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file)

    def read(held: Held) -> torch.Tensor | None:
        if held.tensor not in places:
            return None
        with safe_open(places[held.tensor], framework="pt") as tensors:
            view = tensors.get_slice(held.tensor)
            rows = view[held.start : held.stop] if view.get_shape() else tensors.get_tensor(held.tensor)
        return rows.float().reshape(held.values.shape)  # type: ignore[no-any-return]

    return read


def base_numbers(unmerged: Any) -> Expected:
    """The base's parameters inside PEFT's wrappers, for those whose names in the files are the model's."""
    parameters = _of_base(unmerged)

    def read(held: Held) -> torch.Tensor | None:
        parameter = parameters.get(held.tensor)
        if parameter is None:
            return None
        with streaming.present(parameter):
            rows = parameter.data if not parameter.dim() else parameter.data[held.start : held.stop]
            fits = rows.numel() == held.values.numel()
            return rows.float().reshape(held.values.shape).clone() if fits else None

    return read


def effective_numbers(unmerged: Any) -> Expected:
    """The weights that PEFT's unmerged modules have in effect, asked of them in fp32; the base's for others."""
    model = unmerged.base_model.model
    wrapped = wrapped_modules(model)
    saved, plain_numbers = _saved_whole(unmerged), base_numbers(unmerged)

    @functools.lru_cache(maxsize=1)
    def of(path: str) -> dict[str, torch.Tensor]:
        module = wrapped[path]
        with streaming.present(module):
            if hasattr(module, "parameter_name"):
                names = wrapped_parameters(module)
                return {
                    f"{path}.{n}": torch.cat([b.float() for *_, b in effective_blocks(module, n)]) for n in names
                }
            return {f"{path}.weight": _effective_weight(module)}

    def read(held: Held) -> torch.Tensor | None:
        path = next((p for p in wrapped if held.tensor.startswith(f"{p}.")), None)
        known = saved if held.tensor in saved else of(path) if path else {}
        if held.tensor not in known:
            return plain_numbers(held)
        with streaming.present(known[held.tensor]):
            return known[held.tensor][held.start : held.stop].float().reshape(held.values.shape).clone()

    return read


@torch.no_grad()
def _effective_weight(module: Any) -> torch.Tensor:
    """In the layer's own orientation; NaN for a layer that cannot be asked."""
    layer = base_layer(module)
    if not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
        return torch.full_like(layer.weight, float("nan"))
    exact = copy.deepcopy(module).double()
    blocks = whole_probes(exact)
    if isinstance(layer, nn.Embedding):
        return torch.cat([exact(ids) for ids in blocks or ()]).float()
    width = layer.weight.shape[1 if isinstance(layer, nn.Linear) else 0]
    one_hot = blocks or iter(torch.split(torch.eye(width, dtype=torch.float64), BLOCK))
    bias = exact(torch.zeros(1, width, dtype=torch.float64))
    columns = torch.cat([exact(x) - bias for x in one_hot]).float()
    return columns if isinstance(layer, Conv1D) else columns.T.contiguous()


def _judge(
    held: Held, wanted: torch.Tensor | None, stored: Mapping[str, torch.dtype] | None, found: GraphModel
) -> None:
    if wanted is None:
        found.unchecked.append(held.tensor)
        return
    found.checked += 1
    if held.quantized is not None:
        error = _block_error(held.values, wanted, held.quantized)
    elif stored is None:
        error = _cast_error(held, wanted)
    else:
        coarsest = max(stored.values(), key=lambda d: torch.finfo(d).eps)
        error = _rounding_error(held, wanted, stored.get(held.tensor, coarsest))
    if not error <= 1:
        found.wrong.append(held.tensor)


def _cast_error(held: Held, wanted: torch.Tensor) -> float:
    """0 where every number is the nearest of its type, infinite elsewhere."""
    cast = (wanted + held.plus).to(held.dtype).float() - held.plus
    return 0.0 if torch.equal(cast, held.values) else float("inf")


def _rounding_error(held: Held, wanted: torch.Tensor, stored: torch.dtype) -> float:
    """In units of two roundings, to the checkpoint's type and to the graph's, and of fp32 arithmetic."""
    eps = sum(torch.finfo(d).eps / 2 for d in (stored, held.dtype))
    smallest = max(torch.finfo(d).tiny * torch.finfo(d).eps for d in (stored, held.dtype))
    size = wanted.abs() + abs(held.plus)
    allowed = eps * size + ARITHMETIC * size.max() + smallest
    return float(((held.values - wanted).abs() / allowed).max()) if wanted.numel() else 0.0


def _block_error(values: torch.Tensor, wanted: torch.Tensor, how: Quantized) -> float:
    """The error of a quantized matrix in units of what honest quantization may do: at worst, and on the whole."""
    if how.axis == 0:
        values, wanted = values.T, wanted.T
    if how.method in CODE_GAPS:
        values, wanted = values.reshape(1, -1), wanted.reshape(1, -1)
    missing = -wanted.shape[1] % how.block_size
    blocks, exact = (nn.functional.pad(x, (0, missing)).reshape(-1, how.block_size) for x in (values, wanted))
    largest = exact.abs().amax(1)
    if how.method in CODE_GAPS:
        # bitsandbytes' blocks run on across rows, so that a piece of a stacked matrix may begin within one.
        largest = nn.functional.max_pool1d(largest[None], 3, stride=1, padding=1)[0]
        most, typical = CODE_GAPS[how.method]
        step = largest
    else:
        bits = int(how.method.removeprefix("int"))
        spread = exact.amax(1).clamp_min(0) - exact.amin(1).clamp_max(0)
        step = largest / 2 ** (bits - 1) if how.symmetric else spread / (2**bits - 1)
        most, typical = STEPS, RMS_STEPS
    error = (blocks - exact).abs()
    worst = (error.amax(1) / (most * step + SCALE_ROUNDING * largest).clamp_min(1e-30)).max()
    used = largest > 0
    rounding = (typical * step + SCALE_ROUNDING * largest)[used, None]
    overall = (error[used] / rounding).square().mean().sqrt() if used.any() else worst
    return float(torch.maximum(worst, overall))


class _Writer:
    """Checkpoint tensors, put together from their pieces, into safetensors files of about SHARD bytes."""

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
            self._save({_HEAD: values.clone()}, f"{_HEAD}.bin.safetensors")
            return
        if other:
            self._promote(name)
        self._shard[name] = values.clone()
        if sum(t.nbytes for t in self._shard.values()) > SHARD:
            self._flush()

    def _promote(self, name: str) -> None:
        """What was taken for the only copy is the head's."""
        if name not in self._shard:
            with safe_open(self._folder / self._places[name], framework="pt") as tensors:
                self._shard[name] = tensors.get_tensor(name)
        self._save({_HEAD: self._shard.pop(name)}, f"{_HEAD}.bin.safetensors")

    def _flush(self) -> None:
        if self._shard:
            file = f"model-{len(set(self._places.values())):05}.safetensors"
            self._save(self._shard, file)
            self._places |= dict.fromkeys(self._shard, file)
            self._shard = {}

    def _save(self, tensors: dict[str, torch.Tensor], file: str) -> None:
        save_file(tensors, self._folder / file, metadata={"format": "pt"})

    def finish(self) -> torch.Tensor | None:
        """The output head's own numbers, where it has any."""
        self._flush()
        index = {"metadata": {}, "weight_map": self._places}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        head = self._folder / f"{_HEAD}.bin.safetensors"
        if not head.exists():
            return None
        with safe_open(head, framework="pt") as tensors:
            return tensors.get_tensor(_HEAD)  # type: ignore[no-any-return]


def _load(work: Path, unmerged: Any, merged: Path, head: torch.Tensor | None, keep: int | None) -> Any:
    body = plain(unmerged)
    config = copy.deepcopy(body.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    tied = getattr(loading.config_of(merged).get_text_config(), "tie_word_embeddings", None)
    if tied is not None:  # a merge unties a head that it changes
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = tied
    config.save_pretrained(work)
    model, info = loading.load(type(body), work, torch.float32, keep)
    streaming.attach(model, ())
    fill_from_base(model, info["missing_keys"], unmerged)
    if head is not None:
        output = model.get_output_embeddings()
        output.weight = torch.nn.Parameter(head, requires_grad=False)
    return loading.quiet(model)


def fill_from_base(model: Any, missing: Sequence[str], unmerged: Any) -> None:
    """Parameters and buffers that the data files do not hold (folded away, or zero) are the base's, or the
    adapter's where it saved a module whole."""
    known = _of_base(unmerged) | _saved_whole(unmerged)
    state = {}
    for name in missing:
        if name in known:
            with streaming.present(known[name]):
                state[name] = known[name].detach().clone()
    model.load_state_dict(state, strict=False)


def _of_base(unmerged: Any) -> dict[str, torch.Tensor]:
    """Plain name → parameter or buffer of the base inside PEFT's wrappers."""
    base = unmerged.base_model.model
    named = (*base.named_parameters(remove_duplicate=False), *base.named_buffers())
    return {n.replace(".base_layer", "").replace(".original_module", ""): v for n, v in named}


def _saved_whole(unmerged: Any) -> dict[str, torch.Tensor]:
    model = unmerged.base_model.model
    return dict(plain_parameters(model, wrapped_modules(model)))
