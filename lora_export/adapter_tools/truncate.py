"""An adapter in a lower rank: each module keeps the largest singular values of its own B·A."""

from pathlib import Path

from lora_export.adapter_tools.saving import Derived, DType, NewAdapter, Rank, check_rank
from lora_export.adapters import CONFIG, AdapterFile, lora, read_adapter
from lora_export.adapters.spelling import respelled
from lora_export.adapters.updates import LowRank, LowRankUpdate
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import Adapter, TargetUpdate
from lora_export.deltas import spectrum
from lora_export.errors import AdapterError


def truncate(adapter: Path, output: Path, wanted: Rank, dtype: DType = "float32", force: bool = False) -> Derived:
    """Write `adapter` with fewer ranks: LoRA and others of factors as LoRA, DoRA as DoRA with its magnitudes.

    The error is exact: the norm of the singular values that are left out (Eckart and Young, 1936); of DoRA it is
    that of B·A, before the magnitudes. Whole tensors and trained tokens go along. AdapterError for other kinds.
    """
    check_rank(wanted, needed=True)
    config, tensors = open_adapter_files(adapter)
    file = respelled(AdapterFile(tensors, config, adapter / CONFIG))
    read = read_adapter(file)
    new = NewAdapter("truncate", config)
    for update in read.updates:
        if not _carried(new, file, read, update):
            low = _factors(file, read, update)
            values = spectrum.of_factors(low.scaling * low.left, low.right)
            new.add(update.target.removesuffix(".weight"), values, wanted.of(values), "embedding" in update.kind)
    return new.write(output, dtype, force, [adapter])


def _carried(new: NewAdapter, file: AdapterFile, adapter: Adapter, update: TargetUpdate) -> bool:
    """Take along what has no rank; whether there was nothing else."""
    if update.kind == "dora":
        new.whole[update.keys[2]] = file.source.read(update.keys[2])
        return False
    if update.kind == "lora_bias":  # its scaling is 1 from now on
        addend = file.read(update.keys[0])
        low = next(u for u in adapter.updates if u.target == f"{update.target.removesuffix('.bias')}.weight")
        scaling = _factors(file, adapter, low).scaling
        new.whole[update.keys[0]] = scaling * addend
    elif (update.replaces and update.kind != "ln_tuning") or update.kind == "trainable_tokens":
        new.whole |= {key: file.source.read(key) for key in update.keys}
    else:
        return False
    return True


def _factors(file: AdapterFile, adapter: Adapter, update: TargetUpdate) -> LowRank:
    """B (outputs, r), A (r, inputs) and scaling of a module; of an embedding (rows, r) and (r, width)."""
    if update.kind == "dora":
        return lora.factors(file, update.target).double()
    shape = update.shapes[0]
    loaded = update.load(tuple(n or 0 for n in shape)) if update.low_rank and None not in shape else None
    if not isinstance(loaded, LowRankUpdate) or len(shape) > 2:
        raise AdapterError(
            f"the adapter's {update.kind} has no matrices A and B of one rank",
            where=adapter.folder,
            tensor=update.target,
            expected="LoRA, DoRA, AdaLoRA, VB-LoRA, DeLoRA or GraLoRA on linear layers and embeddings",
            next_step="lora-export combine -a ADAPTER --rank N -o OUT makes LoRA of other kinds that add a delta",
        )
    return loaded.low_rank.double()
