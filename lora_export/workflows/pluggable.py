"""A base exported once with slots for LoRA, and each adapter as a small file that a runtime plugs in as it runs."""

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.contracts import AdapterChoice, ExportOptions, ExportResult, MergeOptions, Progress
from lora_export.errors import AdapterError, ExportError, InputError
from lora_export.storage import sealed

if TYPE_CHECKING:
    from lora_export.adapters.updates import LowRank
    from lora_export.onnx_export.engines.isolated import Worker
    from lora_export.onnx_export.graphs.slots import LoraSlot

PRECISIONS = ("fp32", "fp16", "bf16")
_MODULE = re.compile(r".*\blayers\.(\d+)\..*?([^.]+)\.weight")
Updates = dict[str, "LowRank"]  # by the name of the weight


def export_pluggable(
    base: Path,
    adapters: Sequence[Path],
    output: Path,
    options: ExportOptions,
    progress: Progress,
    worker: "Worker | None" = None,
) -> ExportResult:
    """Write the base's graph with slots into `output`, and NAME.onnx_adapter for each adapter, NAME its folder's.
    worker: the process to make it in, a new one if None.

    Without an adapter the graph computes the base. AdapterError for an adapter that is not plain LoRA on linear
    layers, ExportError for a precision or an architecture that cannot be exported unmerged.
    """
    from lora_export.onnx_export import export
    from lora_export.onnx_export.graphs.slots import SUFFIX
    from lora_export.onnx_export.quantize.settings import refuse_without_kernel
    from lora_export.workflows.proving import prover

    refuse_without_kernel(options.precision)
    if options.precision not in PRECISIONS:
        raise ExportError(
            f"adapters with a graph in {options.precision}",
            expected=f"{', '.join(PRECISIONS)}: what is plugged in is not quantized",
            next_step="one of them, or merge: lora-export merge-and-export --precision " + options.precision,
        )
    names = _names(adapters)
    updates = [_low_rank(base, adapter) for adapter in adapters]

    def finish(stage: Path) -> dict[str, Any]:
        written = [stage / f"{name}{SUFFIX}" for name in names]
        _fill(stage / "model.onnx", zip(written, updates, adapters, strict=True))
        return {"pluggable": names}

    with tempfile.TemporaryDirectory(prefix="lora-export-") as work:
        return export(
            base,
            output,
            replace(options, optimize="full"),
            adapter=_one_for_all(Path(work), updates),
            finish=finish,
            prove=prover(options.proof),
            inputs=adapters,
            worker=worker,
            progress=progress,
        )


def _names(adapters: Sequence[Path]) -> list[str]:
    names = [a.resolve().name for a in adapters]
    for name in names:
        if names.count(name) > 1 or not sealed.plain_name(name):
            raise InputError(
                f"{names.count(name)} adapters would be written as {name!r}",
                where=adapters[names.index(name)],
                expected="folders whose names are different, and names of files",
                next_step="rename the folder of one of them",
            )
    return names


def plug(graph: Path, base: Path, adapter: Path) -> Path:
    """Make slots of the LoRA in an unmerged graph, in place, and write the adapter that fills them beside it.

    graph: the .onnx file; base, adapter: the folders that it was exported from. The adapter's file.
    """
    from lora_export.onnx_export.graphs.slots import SUFFIX

    file = graph.with_suffix(SUFFIX)
    _fill(graph, [(file, _low_rank(base, adapter), adapter)])
    return file


def _fill(graph: Path, adapters: Iterable[tuple[Path, Updates, Path]]) -> None:
    """Make slots of the LoRA in an unmerged graph, and write each adapter: its file, its updates, its folder."""
    from lora_export.onnx_export.graphs.slots import open_slots, write_adapter

    slots = {(s.layer, s.leaf): s for s in open_slots(graph)}
    for file, updates, folder in adapters:
        write_adapter(file, _by_slot(updates, slots, folder))


def _low_rank(base: Path, adapter: Path) -> Updates:
    """The weights that an adapter changes, each with its A, B and scaling."""
    from lora_export.adapters.updates import LowRankUpdate
    from lora_export.merging import plan

    planned = plan(base, [AdapterChoice(adapter)], MergeOptions())
    low_rank: Updates = {}
    for name, tensor in planned.tensors.items():
        for target in tensor.updates:
            update = target.load(tensor.shape)
            if target.kind != "lora" or not isinstance(update, LowRankUpdate):
                raise AdapterError(
                    f"{target.kind} is not LoRA on a linear layer, and cannot stay outside the weights",
                    where=adapter,
                    tensor=name,
                    expected="plain LoRA on the projections of attention and MLP",
                    next_step="lora-export merge-and-export",
                )
            low_rank[name] = update.low_rank
    return low_rank


def _one_for_all(folder: Path, updates: Sequence[Updates]) -> Path:
    """An adapter of rank 1, without effect, on every weight that some adapter changes: the engine makes slots."""
    import torch
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for own in updates:
        for name, low_rank in own.items():
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{prefix}.lora_A.weight"] = torch.zeros(1, low_rank.right.shape[1])
            tensors[f"{prefix}.lora_B.weight"] = torch.zeros(low_rank.left.shape[0], 1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": sorted({n.removesuffix(".weight") for own in updates for n in own}),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _by_slot(
    updates: Updates, slots: "dict[tuple[int, str], LoraSlot]", adapter: Path
) -> dict["LoraSlot", tuple[Any, Any]]:
    """Aᵀ and s·Bᵀ for each slot that the adapter uses."""
    filled = {}
    for name, low_rank in updates.items():
        match = _MODULE.fullmatch(name)
        slot = slots.get((int(match[1]), match[2])) if match else None
        if slot is None or (slot.inputs, slot.outputs) != (low_rank.right.shape[1], low_rank.left.shape[0]):
            raise ExportError(
                "the graph has no slot for the LoRA of this weight",
                where=adapter,
                tensor=name,
                expected="LoRA on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj",
                next_step="lora-export merge-and-export",
            )
        filled[slot] = (low_rank.right.T.numpy(), (low_rank.scaling * low_rank.left).T.numpy())
    return filled
