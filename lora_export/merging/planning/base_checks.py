"""Is this the base that the adapter was trained on? An adapter holds the base's name, but no hash of it.

Each check reports what files can show: "agrees", "differs" or "unknown". A plain LoRA that names no base fits any
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

if TYPE_CHECKING:
    import torch

ROWS = 64  # of a block that is compared
BLOCKS = 16  # spread over an embedding
# Training moves DoRA's magnitudes by a few per cent from the norms of the base that they were taken from.
NORMS = 0.2
COLUMNS = 0.01  # DeLoRA's norms are not trained; they are computed in the type of the base in training

_SNAPSHOT = re.compile(r"models--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})$")

LONGEST_CARD = 2**18  # characters of a model card
_BITSANDBYTES = re.compile(r"-(?P<unsloth>unsloth-)?bnb-(?P<bits>[48])bit$", re.IGNORECASE)
_OTHER = re.compile(r"-(gptq|awq|fp8|mlx|[2-8]-?bit)(-[\w.]+)*$", re.IGNORECASE)
_IN_CARD = re.compile(r"\bload_in_(?P<bits>[48])bit\W{1,4}true\b", re.IGNORECASE)
_DOUBLE = re.compile(r"\bbnb_4bit_use_double_quant\W{1,4}true\b", re.IGNORECASE)
_FP4 = re.compile(r"\bbnb_4bit_quant_type\W{1,4}fp4\b", re.IGNORECASE)


def base_checks(plan: MergePlan) -> list[BaseCheck]:
    """One answer or more for each adapter: agrees, differs, or unknown."""
    return [check for adapter in plan.adapters for check in _of_adapter(plan, adapter)]


def _of_adapter(plan: MergePlan, adapter: Adapter) -> Iterator[BaseCheck]:
    yield _name(plan.base, adapter)
    yield from _revision(plan.base, adapter)
    if plan.options.training_quantization == "none" and not any(t.quantized for t in plan.tensors.values()):
        yield from _quantized_in_training(adapter)
    yield from _architecture(plan.base, adapter)
    yield BaseCheck("shapes", "agrees", f"all {len(adapter.updates)} updates fit a weight of the base")
    values = [*_magnitudes(plan, adapter), *_column_norms(plan, adapter), *_untouched_rows(plan, adapter)]
    yield from values or [
        BaseCheck(
            "values",
            "unknown",
            "this adapter contains no values of its base, so another base of the same shapes looks the same",
        )
    ]


def _name(base: Checkpoint, adapter: Adapter) -> BaseCheck:
    wanted = str(adapter.config.get("base_model_name_or_path") or "")
    if not wanted:
        return BaseCheck("name", "unknown", "the adapter names no base")
    called, certain = _named(base)
    short = Path(wanted).name
    if called.rpartition("/")[2].lower() in (short.lower(), _BITSANDBYTES.sub("", short).lower()):
        return BaseCheck("name", "agrees", f"the adapter names {short}, and the base is called {called}")
    outcome: Outcome = "differs" if certain and "/" in wanted and not Path(wanted).is_absolute() else "unknown"
    return BaseCheck("name", outcome, f"the adapter names {short}, the base is called {called}")


def _named(base: Checkpoint) -> tuple[str, bool]:
    """The base's name, and whether it is one of the Hub's: a folder may have any name."""
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
    own = (base.config.get("architectures") or [None])[0]
    if wanted and own:
        outcome: Outcome = "agrees" if wanted == own else "unknown"  # with or without a head, both may be right
        yield BaseCheck("architecture", outcome, f"trained as {wanted}, the base is a {own}")


def _magnitudes(plan: MergePlan, adapter: Adapter) -> Iterator[BaseCheck]:
    """DoRA starts from the norms of its base's outputs, so its result has about the same norms."""
    import torch

    update, tensor = next(_updates_of(plan, adapter, lambda u, t: u.kind == "dora" and t.row_wise), (None, None))
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

    update, tensor = next(_updates_of(plan, adapter, lambda u, t: u.kind == "delora"), (None, None))
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
    """In an embedding or head that was saved whole, rows of tokens that training never saw are the base's."""

    names = (*INPUT_EMBEDDINGS, *OUTPUT_HEADS)
    for update, tensor in _updates_of(plan, adapter, lambda u, t: u.replaces and t.output.name in names):
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
                f"none of {total} rows of {tensor.output.name} is the base's own: this is another base, or "
                "training used weight decay",
            )


def _updates_of(plan: MergePlan, adapter: Adapter, wanted: Any) -> Iterator[tuple[TargetUpdate, PlannedTensor]]:
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


def _quantized_in_training(adapter: Adapter) -> Iterator[BaseCheck]:
    """What the adapter's folder says of the quantization of its base in training.

    Its own files do not say it, but trainers on 4 bits name a repository that is stored so, and older versions of
    PEFT wrote the configuration of bitsandbytes into README.md.
    """
    name = str(adapter.config.get("base_model_name_or_path") or "")
    name = Path(name).name if Path(name).is_absolute() else name
    stored, card = _BITSANDBYTES.search(name), _card(adapter.folder)
    source, more = f"the adapter was trained on {name}", ""
    if stored is not None:
        flags, more = _flags(stored["bits"], True, False), f", or by {name} itself as -b"
        more += ", some of whose layers stay in 16 bits" if stored["unsloth"] else ""
    elif (match := _IN_CARD.search(card)) is not None:
        flags = _flags(match["bits"], _DOUBLE.search(card) is not None, _FP4.search(card) is not None)
        source = f"the adapter's README.md says load_in_{match['bits']}bit"
    elif _OTHER.search(name):
        flags = f"{name} itself as -b"
    else:
        return
    yield BaseCheck(
        "training quantization",
        "differs",
        f"{source}, so training saw quantized weights, and this base has them in 16 bits or more. What training "
        f"computed is reproduced by {flags}{more}",
    )


def _flags(bits: str, double: bool, fp4: bool) -> str:
    if bits == "8":
        return "--training-quantization int8"
    return f"--training-quantization {'fp4' if fp4 else 'nf4'}" + (" --training-double-quant" if double else "")


def _card(folder: Path) -> str:
    """The beginning of README.md; empty if it is not a file of this folder."""
    path = folder / "README.md"
    if path.is_symlink() or not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(LONGEST_CARD)
