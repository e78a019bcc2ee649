"""In which order the weights of a quantized export get more bits: those that the adapter changes first, then the
others, both by the damage per byte that their rounding does."""

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export.contracts import Progress
from lora_export.onnx_export import records
from lora_export.onnx_export.quantize import calibration
from lora_export.onnx_export.quantize.feeding import stages
from lora_export.onnx_export.quantize.sensitivity import Damage, choose_kept
from lora_export.onnx_export.quantize.stored import StoredMatrices
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import ITEM_SIZE, Weight

TOKENS = 512  # of the texts on which damage is measured: each group of weights costs a run over them


@dataclass(frozen=True)
class Group:
    """Weights that get more bits together. tensors: of the checkpoint, that they are made of; touched: whether the
    adapter changes one of them; nbytes, in_int8, unquantized: bytes of the group as it is, as int8, as floats."""

    tensors: tuple[str, ...]
    touched: bool
    nbytes: int
    in_int8: int
    unquantized: int


def rank(
    made: Path,
    in_int8: Path,
    plain: Path,
    model: Path,
    touched: Collection[str],
    texts: Path | None,
    progress: Progress,
) -> tuple[Group, ...]:
    """The groups of weights that `made` holds in its lowest precision, in the order in which to raise them.

    made: a quantized export; in_int8: the same with all products in int8 (`made` itself, if that is its precision);
    plain: the same in fp32; model: a folder with the tokenizer; touched: tensors of the checkpoint that the adapter
    changes; texts: a file to measure on, by default the built-in page of calibration. ExportError for a graph that
    reads no texts, InputError for texts that cannot be read.
    """
    record, fp32 = records.read_record(made), records.read_record(plain)
    assert record.quantization is not None
    generates = record.kind != "encoder"
    with tempfile.TemporaryDirectory(prefix=".between-", dir=plain) as scratch:
        graphs = [plain / name for name in fp32.graphs]
        run, _, _ = stages(graphs, model, calibration.read(texts), TOKENS, Path(scratch))
        damages = choose_kept(
            run,
            record.quantization,
            logits="logits" if generates else None,
            eight_bits=record.precision != "int8",
            made=StoredMatrices.of(made),
            progress=progress,
        )
    maps = [weights_map.read(folder).weights for folder in (made, in_int8, plain)]
    groups = [_group(damage, maps, touched) for damage in damages]
    return tuple(sorted(groups, key=lambda g: not g.touched))


def _group(damage: Damage, maps: Sequence[Sequence[Weight]], touched: Collection[str]) -> Group:
    """maps: the weights of the export as it is, in int8 and in fp32."""
    own = {*damage.tensors}
    sizes = [_nbytes(weights, own) for weights in maps]
    sizes[-1] = sizes[-1] * _width(maps[0]) // ITEM_SIZE["float32"]
    return Group(damage.tensors, not own.isdisjoint(touched), *sizes)


def _width(weights: Sequence[Weight]) -> int:
    """Bytes of a number that an export does not quantize: the type of its scales."""
    every = (w for w in weights if w.recipe.quantized and w.recipe.quantized.part == "scales")
    return min(ITEM_SIZE[w.dtype] for w in every)


def _nbytes(weights: Sequence[Weight], tensors: Collection[str]) -> int:
    """Bytes of those that are made of these tensors."""
    return sum(w.nbytes for w in weights if any(p.tensor in tensors for p in w.recipe.pieces))
