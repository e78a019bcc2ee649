"""The preparation of a base that rows share: made once for a root, and brought to each node once."""

import fcntl
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import AdapterChoice, Progress, Source, StoryOptions
from lora_export.errors import ExportError, InputError
from lora_export.fleet.scratch import PREFIX
from lora_export.fleet.stores.protocol import Store
from lora_export.storage.locks import held
from lora_export.storage.memory import freed
from lora_export.workflows.base_measurement import read_measurement, write_measurement

if TYPE_CHECKING:
    from lora_export.validation.known import KnownBase
    from lora_export.workflows.budget import Pair
    from lora_export.workflows.run_graphs import Control
    from lora_export.workflows.shared_base import SharedBase

ONNX, REFERENCE, BENCHMARK = "onnx", "reference", "benchmark"


# --- making --------------------------------------------------------------------------------------------------


def fill(
    stage: Path,
    work: Path,
    base: Source,
    adapters: Sequence[AdapterChoice],
    options: StoryOptions,
    progress: Progress,
) -> str:
    """Write the base's export, its answers and its graph's latency into `stage`; what is claimed of the latency.

    The adapter is merged first: one that is refused costs no export, and the base may be prepared with another.
    """
    from lora_export.merging import merge, written_source
    from lora_export.workflows.bare_base import without_adapter
    from lora_export.workflows.budget import Pair
    from lora_export.workflows.run_graphs import control_of, export_as, export_merged
    from lora_export.workflows.trained_base import prepared_base

    folder = work / "merged"
    result = merge(base.folder, adapters, folder, options.merge, progress)
    alone = without_adapter(base.folder, work)
    trained_on = prepared_base(alone, [], options.merge, work, progress)
    exported = export_as(trained_on, stage / ONNX, options.export, progress, "the base, for many adapters")
    source = written_source(result)
    merged = export_merged(exported, folder, work / "onnx", options.export, progress, source)
    _answer(stage, work, alone, adapters, folder, Pair(exported, merged), options, progress)
    freed()  # models in PyTorch, before three graphs are opened
    control = control_of(trained_on, alone, adapters, work, options, merged, progress)
    return _measure(stage, base, adapters, Pair(exported, merged), control, options, progress)


def _answer(
    stage: Path,
    work: Path,
    alone: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    pair: "Pair",
    options: StoryOptions,
    progress: Progress,
) -> None:
    """Keep what a validation of the adapter computes of the base. Its verdict is the row's own to find."""
    from lora_export.validation import validate
    from lora_export.validation.known import KnownBase
    from lora_export.workflows.trained_base import stand_in
    from lora_export.workflows.validating import pair_of

    known = KnownBase(stage / REFERENCE)
    validate(
        alone,
        adapters,
        merged,
        exports=[pair_of(pair.merged, pair.base.output)],
        dequantized=stand_in(alone, merged, options.merge, options.validation.max_memory, work, progress),
        options=options.validation,
        known=known,
        progress=progress,
    )
    known.forget()


def _measure(
    stage: Path,
    base: Source,
    adapters: Sequence[AdapterChoice],
    pair: "Pair",
    control: "Control",
    options: StoryOptions,
    progress: Progress,
) -> str:
    from lora_export.workflows.latency import measure_run
    from lora_export.workflows.shared_base import same_graph

    if not same_graph(pair.base, pair.merged):
        raise ExportError(
            "the adapter that the base is measured with has a graph of its own",
            where=adapters[0].folder,
            expected="an adapter that changes weights of the base, and nothing else",
        )
    measured = measure_run(pair.base, pair.merged, control, options, progress)
    return write_measurement(measured, stage / BENCHMARK, base, adapters, options)


# --- opening -------------------------------------------------------------------------------------------------


@dataclass
class OpenedBase:
    """A preparation on this machine. folder: the object as it lies in the store; home: beside it, for what else is
    made of the base once."""

    key: str
    home: Path
    known: "KnownBase"
    _lock: int

    @property
    def folder(self) -> Path:
        return self.home / "object"

    def shared(self, options: StoryOptions) -> "SharedBase":
        """What a row takes from it; the measurement only if it was made as the row asks."""
        from lora_export.onnx_export import load_export
        from lora_export.workflows.shared_base import SharedBase

        exported = load_export(self.folder / ONNX)
        measured, claim = read_measurement(self.folder / BENCHMARK, options) or (None, "")
        return SharedBase(exported, self.known, self.home, measured, claim)

    def close(self) -> None:
        """Free its memory; the last process of the node that lets it go removes it from the disk."""
        self.known.forget()
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.home, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(self._lock)


_current: OpenedBase | None = None


def opened(base_key: str, store: Store, scratch: Path) -> OpenedBase:
    """The preparation of a base on this node: fetched by the first process that asks, with every hash checked, and
    held until this process asks for another one. InputError if it is not in the store, or was changed there."""
    global _current
    if _current is not None and (_current.key, _current.home.parent) != (base_key, scratch):
        _current.close()
        _current = None
    if _current is None or not _current.folder.is_dir():
        _current = _fetched(base_key, store, scratch)
    return _current


def _fetched(base_key: str, store: Store, scratch: Path) -> OpenedBase:
    from lora_export.validation.known import KnownBase

    home = scratch / f"{PREFIX}base-{base_key}"
    lock = held(home)
    try:
        # The folder is shared by all; one at a time looks whether it is filled.
        with (home / ".fetching").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            place = f"bases/{base_key}"
            if not (home / "object").is_dir() and store.fetch(place, home / "object") is None:
                raise InputError(
                    "the preparation of the base is gone",
                    where=f"{store.where}/{place}",
                    expected="what the fleet prepared before its rows",
                    next_step="run the same command again: it prepares the base anew",
                )
    except BaseException:
        os.close(lock)
        raise
    return OpenedBase(base_key, home, KnownBase(home / "object" / REFERENCE, weights=home / "weights"), lock)
