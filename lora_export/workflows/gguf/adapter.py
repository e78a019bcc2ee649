"""The adapter of a run as a GGUF LoRA: A and B of each weight, laid out as the converter lays out that weight.

llama.cpp computes W·x + alpha/r · B·(A·x), with one alpha for the file and r the rows of each A.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export import manifest
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import AdapterError, InputError
from lora_export.packages.job import Run
from lora_export.workflows.gguf.converting import Conversion, Place

if TYPE_CHECKING:
    import torch

    from lora_export.adapters.updates import LowRank

Updates = Mapping[str, "LowRank"]  # by the name of the weight in the merged folder
# Of a layer, and the head: what every graph of llama.cpp multiplies with a LoRA beside it.
_MULTIPLIED = frozenset(
    {
        "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output",
    }
)  # fmt: skip
_MERGED = "the merged model's GGUF file, which holds whatever an adapter does: leave out --adapter"


def read(run: Run, adapter: Path) -> Updates:
    """What the adapter of a run does to each weight, if that is B·A beside a linear layer.

    InputError for files that are not those that the run merged; AdapterError for what a GGUF LoRA cannot hold.
    """
    from lora_export.adapters.updates import LowRankUpdate
    from lora_export.merging import plan

    assert run.merged is not None
    recorded = _recorded(run, adapter)
    updates = {}
    planned = plan(run.merged, [AdapterChoice(adapter, recorded.weight)], MergeOptions())
    for name, tensor in planned.tensors.items():
        for target in tensor.updates:
            update = target.load(tensor.shape) if target.low_rank else None
            if target.kind != "lora" or not isinstance(update, LowRankUpdate):
                raise AdapterError(
                    f"a GGUF LoRA cannot hold {target.kind}",
                    where=adapter,
                    tensor=name,
                    expected="plain LoRA on linear layers",
                    next_step=_MERGED,
                )
            updates[name] = update.low_rank
    return updates


def _recorded(run: Run, adapter: Path) -> manifest.RecordedAdapter:
    """The run's only adapter, whose files these are."""
    recorded = run.manifest.adapters
    method = run.manifest.recorded_options.merge.combine
    if len(recorded) != 1 or method != "none":
        raise InputError(
            f"--adapter, and the run merged {len(recorded)} adapters (--combine {method})",
            where=run.folder,
            expected="the run of one adapter",
            next_step=_MERGED,
        )
    findings = manifest.same_inputs("adapter_files", recorded[0].files, adapter)
    wrong = next((f for f in findings if not f.passed), None)
    if wrong is not None:
        raise InputError(
            f"this is not the adapter that the run merged: {wrong.note}",
            where=adapter,
            expected=f"{recorded[0].name}, as the run's manifest.json has its files",
        )
    return recorded[0]


def shapes(updates: Updates) -> dict[str, tuple[int, ...]]:
    """Of the weights, as they are stored."""
    return {name: (len(low.left), low.right.shape[1]) for name, low in updates.items()}


def write(path: Path, name: str, updates: Updates, conversion: Conversion, adapter: Path) -> None:
    """Write the file. AdapterError for a weight that llama.cpp has elsewhere, or not at all."""
    from lora_export.checkpoint.gguf import library

    gguf = library()
    alphas = {weight: low.scaling * len(low.right) for weight, low in updates.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    pairs = {}
    for weight, low in sorted(updates.items()):
        place = conversion.places.get(weight)
        leaf = place.name.removesuffix(".weight").rpartition(".")[2] if place else ""
        if place is None or leaf not in _MULTIPLIED or not place.name.endswith(".weight"):
            raise AdapterError(
                "llama.cpp has no place for a LoRA beside this weight",
                where=adapter,
                tensor=weight,
                expected="LoRA on the projections of attention and MLP",
                next_step=_MERGED,
            )
        pairs[place.name] = _placed(low, place, alphas[weight] / alpha)
    writer = gguf.GGUFWriter(path, conversion.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for called, (down, up) in pairs.items():
        writer.add_tensor(f"{called}.lora_a", down.contiguous().numpy())
        writer.add_tensor(f"{called}.lora_b", up.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _placed(low: "LowRank", place: Place, factor: float) -> tuple["torch.Tensor", "torch.Tensor"]:
    """A (r, inputs) and factor · B (outputs, r), fp32, of the weight as llama.cpp has it."""
    up, down = (low.right.T, low.left.T) if place.transposed else (low.left, low.right)
    if place.rows is not None:
        up = up[list(place.rows)]
    if place.columns is not None:
        down = down[:, list(place.columns)]
    return down, up if factor == 1.0 else up * factor
