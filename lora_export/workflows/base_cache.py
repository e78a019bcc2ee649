"""What a run makes of its base alone, kept for the next adapter of that base: its export, what it answers in a
validation, and the latency of its graph.

    CACHE/bases/KEY/onnx        the base's export, as it was proven
    CACHE/bases/KEY/reference   answers, each below the digest of all that it depends on (validation/known.py)
    CACHE/bases/KEY/benchmark   a report for each machine and way to measure
    CACHE/bases/KEY/seed        drawn once: with another one, a validation asks for other answers

Of a run that shares nothing, one line says why. No fault of the cache is a fault of the run.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export.contracts import (
    AdapterChoice,
    BenchmarkResult,
    CachePart,
    CacheUse,
    ExportResult,
    Progress,
    Source,
    Story,
    StoryOptions,
)
from lora_export.errors import LoraExportError
from lora_export.keys.inputs import base_inputs, key_of
from lora_export.storage.cache import Cache, Entry, Part
from lora_export.workflows.shared_base import (
    SharedBase,
    same_graph,
    why_not_exported_alike,
    why_not_shared,
    why_other_modules,
)

if TYPE_CHECKING:
    from lora_export.merging import MergePlan
    from lora_export.validation.known import KnownBase

ONNX, REFERENCE, BENCHMARK, SEED = "onnx", "reference", "benchmark", "seed"
_KEPT = ("equivalent", "equivalent_by_structure")  # a verdict that was none may be one the next time


@contextlib.contextmanager
def base_for(
    given: SharedBase | None,
    base: Source,
    adapters: Sequence[AdapterChoice],
    planned: "MergePlan",
    options: StoryOptions,
    progress: Progress,
) -> Iterator[SharedBase]:
    """What a run takes of its base: from whoever runs it (`given`), from the cache that its options name, or
    nothing. `use_of` says afterwards what was taken."""
    if given is None and options.cache is None:
        yield SharedBase()
        return
    reason = why_not_shared(planned)
    if given is not None:
        if reason:
            progress.detail(f"a base of its own: {reason}")
        yield SharedBase() if reason else given
        return
    kept = CachedBase(base, adapters, options, progress)
    reason = reason or why_not_exported_alike(options, base.folder) or why_other_modules(base.folder, adapters)
    try:
        yield kept.without(reason) if reason else kept.opened()
    finally:
        kept.close()


def use_of(shared: SharedBase, story: Story) -> CacheUse | None:
    """What a run took from the cache, and what it computed; None for a run without a cache."""
    return shared.keeper.use(story) if isinstance(shared.keeper, CachedBase) else None


@dataclass
class CachedBase:
    """A base in the cache while a run has it open."""

    base: Source
    adapters: Sequence[AdapterChoice]
    options: StoryOptions
    progress: Progress
    _key: str = ""
    _files: Mapping[str, str] = field(default_factory=dict)
    _entry: Entry | None = None
    _shared: SharedBase = field(default_factory=SharedBase)
    _latency_part: Part | None = None
    _parts: list[CachePart] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)

    # --- opening -------------------------------------------------------------------------------------------------

    def without(self, reason: str) -> SharedBase:
        """Nothing, and why."""
        self._notes.append(reason)
        self.progress.detail(f"nothing of the base is taken from the cache or kept there: {reason}")
        return SharedBase(keeper=self)

    def opened(self) -> SharedBase:
        """What is there and sound, and the run as the keeper of what is not."""
        assert self.options.cache is not None
        cache = Cache(self.options.cache.absolute(), self.options.cache_size)
        try:
            cache.prepare()
            self._files = self._hashed()
            inputs = base_inputs(self.options, self._files)
            self._key = key_of({**inputs, "proof": self.options.export.proof})
            latency = self._latency
            self._entry = cache.open(self._key, (ONNX, *latency))
            self._notes += self._entry.damaged
            for damaged in self._entry.damaged:
                self.progress.warn(f"the cache of this base: {damaged}; it is computed anew")
            return self._found(latency)
        except (LoraExportError, OSError) as error:
            told = f"{error.found} ({error.where})" if isinstance(error, LoraExportError) else str(error)
            return self.without(f"the cache cannot be used: {told}")

    def _found(self, latency: Sequence[str]) -> SharedBase:
        from lora_export.onnx_export import load_export

        assert self._entry is not None
        part = self._entry.found.get(ONNX)
        exported = load_export(part.folder) if part is not None else None
        if part is not None:
            self._took("export", part)
        self._latency_part = self._entry.found.get(latency[0]) if latency else None
        measured, claim = self._measured(self._latency_part)
        known = self._known() if self._is_one_adapter() else None
        if known is None:
            self._notes.append("of a base with several adapters the export alone is shared")
        seed = self._entry.drawn(SEED, 2**31) if known else None
        self._shared = SharedBase(exported, known, measured=measured, claim=claim, seed=seed, keeper=self)
        return self._shared

    def _hashed(self) -> Mapping[str, str]:
        from lora_export.keys import hashes

        assert self.options.cache is not None
        return hashes.Hashes(self.options.cache.absolute() / hashes.NAME).of(self.base.folder)

    def _is_one_adapter(self) -> bool:
        """Of several, one after the other is the reference, or all of them together."""
        return len(self.adapters) == 1 and self.options.merge.combine == "none"

    def _known(self) -> "KnownBase | None":
        from lora_export.validation.known import MOST_BYTES, KnownBase

        assert self._entry is not None
        room = min(MOST_BYTES, self._entry.room())
        return KnownBase(self._entry.folder / REFERENCE, most_bytes=room, stays=False)

    @functools.cached_property
    def _latency(self) -> tuple[str, ...]:
        """The name of the measurement that this run would make; () where it has to make its own."""
        from lora_export.benchmarking import environment
        from lora_export.storage.documents import as_json
        from lora_export.workflows.base_measurement import conditions

        options = self.options
        if not self._is_one_adapter() or options.extra_arms or options.benchmark.max_seconds is not None:
            return ()
        machine = replace(environment.describe(), ram_bytes=None)
        asked = {
            "asked": conditions(options.benchmark, options.export.provider),
            "machine": as_json(machine),
            "cores": environment.usable_cores(),
        }
        return (f"{BENCHMARK}/{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()}",)

    def _measured(self, part: Part | None) -> tuple[BenchmarkResult | None, str]:
        from lora_export.report import load_samples
        from lora_export.workflows.base_measurement import read_measurement

        found = read_measurement(part.folder, self.options) if part is not None else None
        if part is None or found is None:
            return None, ""
        return replace(found[0], samples=load_samples(part.folder)), found[1]

    # --- keeping -------------------------------------------------------------------------------------------------

    def export(self, made: ExportResult) -> ExportResult:
        """Keep the base's export, which lies in the cache from then on."""
        from lora_export.onnx_export import load_export

        if self._entry is None:
            return made
        try:
            if self._hashed() != self._files:
                self._computed("export", "the files of the base changed while it was exported, so it is not kept")
                return made
            part = self._entry.keep(ONNX, made.output, {"what": "the base's export"})
            self._parts.append(CachePart("export", False, _hashes_of(part)))
            return load_export(part.folder)
        except (LoraExportError, OSError) as error:
            self._not_kept("export", error)
            return made

    def measurement(self, base: ExportResult, merged: ExportResult, made: BenchmarkResult) -> None:
        """Keep the latency of the base's graph, if that is the merged model's graph, and the control was there."""
        import tempfile

        from lora_export.workflows.base_measurement import write_measurement

        if self._entry is None:
            return
        latency, whole = self._latency, all(cell.unmerged_ms is not None for cell in made.cells)
        if not latency or not whole or made.verdict not in _KEPT:
            self._computed("measurement", "it does not stand for other runs")
            return
        try:
            if not same_graph(base, merged):
                self._computed("measurement", "the merged model has a graph of its own")
                return
            with tempfile.TemporaryDirectory(prefix="lora-export-") as folder:
                write_measurement(made, Path(folder) / BENCHMARK, self.base, self.adapters, self.options)
                part = self._entry.keep(latency[0], Path(folder) / BENCHMARK, {"what": "the latency of its graph"})
            self._parts.append(CachePart("measurement", False, _hashes_of(part)))
        except (LoraExportError, OSError) as error:
            self._not_kept("measurement", error)

    def close(self) -> None:
        if self._entry is not None:
            self._entry.cache.make_room(0, self._entry.folder)
            self._entry.close()
            self._entry = None

    # --- what is told of it --------------------------------------------------------------------------------------

    def _took(self, what: str, part: Part) -> None:
        self._parts.append(CachePart(what, True, _hashes_of(part)))
        self.progress.detail(f"the base's {what} is taken from the cache")

    def _computed(self, what: str, note: str) -> None:
        self._parts.append(CachePart(what, False, note=note))

    def _not_kept(self, what: str, error: LoraExportError | OSError) -> None:
        found = error.found if isinstance(error, LoraExportError) else str(error.strerror or error)
        self._computed(what, f"not kept: {found}")
        self.progress.detail(f"the base's {what} is not kept in the cache: {found}")

    def use(self, story: Story) -> CacheUse:
        told = self._shared.known.told if self._shared.known is not None else {}
        answers = [CachePart(what, taken, {"inputs": digest}) for what, (digest, taken) in told.items()]
        latency = [part for part in self._parts if part.what == "measurement"]
        if story.benchmark is not None and not latency and self._latency_part is not None:
            latency = [CachePart("measurement", True, _hashes_of(self._latency_part))]
        exports = [part for part in self._parts if part.what == "export"]
        return CacheUse(self._key, (*exports, *answers, *latency), tuple(self._notes))


def _hashes_of(part: Part) -> dict[str, str]:
    return {name: found.sha256 for name, found in part.files.items()}
