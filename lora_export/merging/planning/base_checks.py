"""Is this the base that the adapter was trained on? An adapter holds a name of it, and no hash.

What files can tell is told in layers, and what they cannot is said, too: a plain LoRA that names no base fits any
model of its shapes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.checkpoint.reader import Checkpoint
from lora_export.choices import Outcome
from lora_export.contracts import Adapter, BaseCheck, TargetUpdate
from lora_export.merging.planning.names import INPUT_EMBEDDINGS, OUTPUT_HEADS
from lora_export.merging.planning.plan import MergePlan, PlannedTensor
from lora_export.merging.planning.training_seen import training_checks, unquantized

if TYPE_CHECKING:
    import torch

ROWS = 64  # of a block that is looked at
BLOCKS = 16  # spread over an embedding
# Training moves DoRA's magnitudes by a few per cent from the norms of the base that they were taken from.
NORMS = 0.2
COLUMNS = 0.01  # nothing trains DeLoRA's norms, which are taken in the type that training has the base in

_SNAPSHOT = re.compile(r"models--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")


def base_checks(plan: MergePlan) -> list[BaseCheck]:
    """One answer or more for each adapter: agrees, differs, or unknown."""
    return [check for adapter in plan.adapters for check in _of_adapter(plan, adapter)]


def _of_adapter(plan: MergePlan, adapter: Adapter) -> Iterator[BaseCheck]:
    yield _name(plan.base, adapter)
    yield from _revision(plan.base, adapter)
    stored = any(t.quantized for t in plan.tensors.values())
    yield from training_checks(adapter, plan.options, stored)
    yield from _architecture(plan.base, adapter)
    yield BaseCheck("shapes", "agrees", f"all {len(adapter.updates)} updates fit a weight of the base")
    values = [*_magnitudes(plan, adapter), *_column_norms(plan, adapter), *_untouched_rows(plan, adapter)]
    yield from values or [
        BaseCheck(
            "values",
            "unknown",
            "this adapter holds no values of its base: another base of the same shapes cannot be told from it",
        )
    ]


def _name(base: Checkpoint, adapter: Adapter) -> BaseCheck:
    wanted = str(adapter.config.get("base_model_name_or_path") or "")
    if not wanted:
        return BaseCheck("name", "unknown", "the adapter names no base")
    found, certain = _named(base)
    short = Path(wanted).name
    if found.rpartition("/")[2].lower() in (short.lower(), unquantized(short).lower()):
        return BaseCheck("name", "agrees", f"the adapter names {short}, and the base is called {found}")
    outcome: Outcome = "differs" if certain and "/" in wanted and not Path(wanted).is_absolute() else "unknown"
    return BaseCheck("name", outcome, f"the adapter names {short}, the base is called {found}")


def _named(base: Checkpoint) -> tuple[str, bool]:
    """The base's name, and whether it is a hub's: a folder may be called anything."""
    snapshot = _SNAPSHOT.search(base.folder.resolve().as_posix())
    if snapshot:
        return snapshot["name"].replace("--", "/"), True
    recorded = str(base.config.get("_name_or_path") or "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", recorded):
        return recorded, True
    return base.folder.resolve().name, False


def _revision(base: Checkpoint, adapter: Adapter) -> Iterator[BaseCheck]:
    wanted = adapter.config.get("revision")
    snapshot = _SNAPSHOT.search(base.folder.resolve().as_posix())
    if wanted and snapshot and re.fullmatch("[0-9a-f]{40}", str(wanted)):
        outcome: Outcome = "agrees" if wanted == snapshot["commit"] else "differs"
        yield BaseCheck("revision", outcome, f"trained on {wanted}, merged into {snapshot['commit']}")


def _architecture(base: Checkpoint, adapter: Adapter) -> Iterator[BaseCheck]:
    mapping = adapter.config.get("auto_mapping")
    wanted = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    found = (base.config.get("architectures") or [None])[0]
    if wanted and found:
        outcome: Outcome = "agrees" if wanted == found else "unknown"  # with or without a head, both may be right
        yield BaseCheck("architecture", outcome, f"trained as {wanted}, the base is a {found}")


def _magnitudes(plan: MergePlan, adapter: Adapter) -> Iterator[BaseCheck]:
    """DoRA begins with the norms of its base's outputs, so its result has about the same norms."""
    import torch

    update, tensor = next(_found(plan, adapter, lambda u, t: u.kind == "dora" and t.row_wise), (None, None))
    if update is None or tensor is None:
        return
    before, after = _applied(update, tensor, 0, min(ROWS, tensor.shape[0]))
    ratio = torch.linalg.norm(after.flatten(1), dim=1) / torch.linalg.norm(before.flatten(1), dim=1)
    off = float((ratio - 1).abs().median())
    outcome: Outcome = "agrees" if off <= NORMS else "differs"
    yield BaseCheck("magnitudes", outcome, f"half of DoRA's magnitudes are within {off:.1%} of this base's norms")


def _column_norms(plan: MergePlan, adapter: Adapter) -> Iterator[BaseCheck]:
    """DeLoRA saves the norms of its base's columns."""
    import torch

    update, tensor = next(_found(plan, adapter, lambda u, t: u.kind == "delora"), (None, None))
    if update is None or tensor is None or tensor.source is None:
        return
    key = next(k for k in update.keys if k.endswith("delora_w_norm"))
    saved = adapter.tensors[key].rows(0, tensor.shape[1]).double()
    squares, height = torch.zeros_like(saved), tensor.shape[0]
    for start in range(0, height, ROWS):
        rows = tensor.source.rows(start, min(start + ROWS, height))
        squares += rows.double().square().sum(0)
    off = float(((squares.sqrt() - saved).abs() / saved.clamp_min(1e-30)).median())  # a column may be zero
    outcome: Outcome = "agrees" if off <= COLUMNS else "differs"
    yield BaseCheck("norms", outcome, f"half of DeLoRA's norms are within {off:.1%} of this base's columns")


def _untouched_rows(plan: MergePlan, adapter: Adapter) -> Iterator[BaseCheck]:
    """Of an embedding or head that was saved whole, the rows of words that training never saw are the base's."""

    names = (*INPUT_EMBEDDINGS, *OUTPUT_HEADS)
    for update, tensor in _found(plan, adapter, lambda u, t: u.replaces and t.output.name in names):
        assert tensor.source is not None
        rows = min(tensor.shape[0], tensor.source.shape[0])
        equal = total = 0
        for start in sorted({rows * i // BLOCKS for i in range(BLOCKS)}):
            before, after = _applied(update, tensor, start, min(start + ROWS, rows))
            equal += int((before == after).all(1).sum())
            total += len(before)
        if equal:
            yield BaseCheck("rows", "agrees", f"{equal} of {total} rows of {tensor.output.name} are the base's own")
        else:
            yield BaseCheck(
                "rows",
                "differs",
                f"none of {total} rows of {tensor.output.name} is the base's own: another base, or training with "
                "weight decay",
            )


def _found(plan: MergePlan, adapter: Adapter, wanted: Any) -> Iterator[tuple[TargetUpdate, PlannedTensor]]:
    """Updates of this adapter, with what they change, among plainly stored weights."""
    mine = {key for update in adapter.updates for key in update.keys}
    for tensor in plan.tensors.values():
        plain = tensor.source is not None and tensor.quantized is None and tensor.training is None
        for update in tensor.updates if plain and len(tensor.shape) == 2 else ():
            if set(update.keys) <= mine and update.keys and wanted(update, tensor):
                yield update, tensor


def _applied(
    update: TargetUpdate, tensor: PlannedTensor, start: int, stop: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Rows of the base, and what the adapter makes of them, in fp32."""
    assert tensor.source is not None
    before = tensor.source.rows(start, stop).float()
    return before, update.load(tensor.shape).apply(before.clone(), slice(start, stop))
