"""What a row of a fleet takes: scratch of a node at once, and bytes of the root; rather too much than too little.

Only for a base in 4 or 8 bits, whose headers do not tell its size in 16 bits, a merge is planned.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.companions import companion_files
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.contracts import FleetRow, MergeOptions

_PLAIN = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
_CHOSEN = {"float32": 4, "float16": 2, "bfloat16": 2}
_SHARES = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5}  # of an fp32 graph; quantized ones keep vocabularies wider
_QUANTIZED = 0.35
_ROOM = 32 * 2**20  # bytes for graphs without their weights, reports and samples


@dataclass(frozen=True)
class Weights:
    """Bytes. nbytes: of the merged weights; widest: of the same in fp32; beside: of tokenizers and the like."""

    nbytes: int
    widest: int
    beside: int


def weights_of(base: Path, options: MergeOptions) -> Weights:
    """Of a merge into this base. LoraExportError for one that cannot be read."""
    if is_pipeline(base):
        nbytes = sum(p.stat().st_size for p in base.rglob("*.safetensors"))
        return Weights(nbytes, 2 * nbytes, 0)
    beside = sum(p.stat().st_size for p in companion_files(base))
    checkpoint = open_checkpoint(base, options.variant)
    tensors = checkpoint.tensors.values()
    if "quantization_config" not in checkpoint.config and all(t.dtype in _PLAIN for t in tensors):
        counts = [(t.nbytes // _PLAIN[t.dtype], _CHOSEN.get(options.dtype, _PLAIN[t.dtype])) for t in tensors]
        return Weights(sum(n * width for n, width in counts), 4 * sum(n for n, _ in counts), beside)
    from lora_export.merging import plan

    planned = plan(base, [], options)
    return Weights(planned.nbytes, planned.nbytes * 4 // _CHOSEN.get(planned.dtype, 4), beside)


def scratch(row: FleetRow, weights: Weights) -> int:
    """At most, of this row or of the preparation of its base: graphs of base, merged and unmerged model before they
    are quantized, the merged folder and one more copy of it, and a package beside them."""
    package = _graph(row, weights) + weights.nbytes if row.target is not None else 0
    copies = 2 if row.options.merged_folder else 1
    return weights.nbytes * copies + weights.widest * 3 + package + 6 * weights.beside + _ROOM


def output(row: FleetRow, weights: Weights) -> int:
    """Of its object."""
    run = _graph(row, weights) + (weights.nbytes if row.options.merged_folder else 0) + 2 * weights.beside
    package = (weights.nbytes if row.target in ("hf", "gguf") else _graph(row, weights)) + weights.beside
    return {"run": run, "package": package, "both": run + package}[row.keep]


def _graph(row: FleetRow, weights: Weights) -> int:
    return int(weights.widest * _SHARES.get(row.options.export.precision, _QUANTIZED))
