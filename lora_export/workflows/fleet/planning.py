"""What a fleet has to do, from headers and hashes alone: keys, shared bases, what is done already, what it takes.

Nothing here loads torch or reads a weight, except to hash a file that was not hashed before.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from lora_export.allowed import check_adapter_folder
from lora_export.checkpoint import open_checkpoint
from lora_export.checkpoint.adapter_files import open_adapter_files, single_file
from lora_export.checkpoint.pipeline import is_pipeline
from lora_export.checkpoint.sources import adapter_choices, resolve
from lora_export.contracts import AdapterChoice, FleetOptions, FleetRow, PlannedRow, Progress, Source
from lora_export.contracts.fleet import KEPT, State
from lora_export.errors import InputError, LoraExportError
from lora_export.fleet.claims import PLACE as CLAIMS
from lora_export.fleet.stores.protocol import Store
from lora_export.fleet.stores.writing import FOLDER
from lora_export.keys.hashes import Contents, Hashes, user_cache
from lora_export.keys.inputs import Spelled, base_inputs, key_of, row_inputs
from lora_export.records import decoded
from lora_export.workflows.fleet import needs
from lora_export.workflows.fleet.verifying import is_root

T = TypeVar("T")
_DOWNLOADS = 8  # at once


def plan(
    rows: Sequence[FleetRow], store: Store, options: FleetOptions, progress: Progress, *, cache: Path | None = None
) -> tuple[PlannedRow, ...]:
    """Each row of this shard with its key, its state and what it needs, in the order of `rows`.

    cache: of the hashes of files; None: the user's. A row that is refused says why, and stops no other.
    InputError for a shard that is none; OutputError for a store that does not answer.
    """
    shard = shard_of(options.shard)
    refuse_occupied(store)
    progress.stage(f"plan: {len(rows)} rows")
    found = _Inputs(options.scratch, Hashes(cache or user_cache()), progress)
    found.find(rows)
    planned = [found.planned(row) for row in rows]
    ours = [p for p in planned if shard is None or in_shard(p, *shard)]
    _with_states(ours, store, options)
    return tuple(found.finished(p) for p in ours)


def refuse_occupied(store: Store) -> None:
    """InputError for a folder that holds something else, such as a model: no fleet may change it."""
    folder = Path(store.where)
    if "://" in store.where or not folder.is_dir() or is_root(store.where):
        return
    other = next((p.name for p in sorted(folder.iterdir()) if p.name not in (FOLDER, CLAIMS)), None)
    if other is not None:
        raise InputError(
            f"the root of the fleet holds something else: {other}",
            where=store.where,
            expected="a root of a fleet, an empty folder, or nothing",
            next_step="choose another -o",
        )


def shard_of(text: str | None) -> tuple[int, int] | None:
    """(I, N) of I/N. InputError for anything else."""
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(
            f"--shard {text}", expected="I/N with 0 ≤ I < N: 0/4, 1/4, 2/4 and 3/4 are all rows, counted from 0"
        )
    return int(index), int(count)


def in_shard(planned: PlannedRow, index: int, count: int) -> bool:
    """Whether a row is of a shard: by its key, or by its name where its inputs cannot be read."""
    digits = planned.key or hashlib.sha256(planned.row.name.encode()).hexdigest()
    return int(digits, 16) % count == index


# --- the states of rows ------------------------------------------------------------------------------------------


def _with_states(planned: list[PlannedRow], store: Store, options: FleetOptions) -> None:
    """The state that the store has for each key, in place: an object is skipped, a verdict stands."""
    keys = {p.key for p in planned}
    objects, failed = store.records("objects", keys), store.records("failed", keys)
    for index, one in enumerate(planned):
        if one.state is None and one.key in objects:
            planned[index] = replace(one, state="skipped")
        elif one.state is None and one.key in failed:
            planned[index] = _judged(one, failed[one.key], store.where, options)


def _judged(planned: PlannedRow, raw: bytes, where: str, options: FleetOptions) -> PlannedRow:
    """With a verdict of an earlier run, unless it is to be tried again. A damaged one is no verdict."""
    try:
        outcome = decoded(raw, f"{where}/failed/{planned.key}/record.json").outcome
    except InputError:
        return planned
    again: Mapping[str | None, tuple[State, ...]] = {"failed": ("gate",), "refused": ("refused",)}
    if outcome.state not in KEPT or outcome.state in again.get(options.again, ()):
        return planned
    return replace(planned, state=outcome.state, error=outcome.error)


# --- inputs ------------------------------------------------------------------------------------------------------


@dataclass
class _Inputs:
    """Bases and adapters of all rows: each found, hashed and looked at once."""

    scratch: Path | None
    hashes: Hashes
    progress: Progress
    spelled: Spelled = field(default_factory=Spelled)
    models: dict[str, Path | LoraExportError] = field(default_factory=dict)
    choices: dict[str, AdapterChoice | LoraExportError] = field(default_factory=dict)
    files: Mapping[Path, Contents | LoraExportError] = field(default_factory=dict)
    _checked: dict[tuple[object, ...], LoraExportError | None] = field(default_factory=dict)
    _sound: set[tuple[object, ...]] = field(default_factory=set)
    _pipelines: dict[Path, bool] = field(default_factory=dict)
    _alone: dict[tuple[object, ...], str] = field(default_factory=dict)
    _base_keys: dict[tuple[object, ...], str] = field(default_factory=dict)
    _weights: dict[tuple[object, ...], needs.Weights | LoraExportError] = field(default_factory=dict)

    def find(self, rows: Sequence[FleetRow]) -> None:
        """Bring what lies elsewhere, and hash everything."""
        self.models = _each((row.model for row in rows), lambda m: located_model(m, self.scratch).folder)
        self.choices = _each((a for row in rows for a in row.adapters), lambda a: located_adapter(a, self.scratch))
        places = [m for m in self.models.values() if isinstance(m, Path)]
        places += [c.folder for c in self.choices.values() if isinstance(c, AdapterChoice)]
        self.files = self.hashes.of_all(places, self.progress.advance)
        self.progress.detail(
            f"{len(self.files)} folders, {self.hashes.read / 1e6:,.1f} MB of them read to hash them"
        )

    def planned(self, row: FleetRow) -> PlannedRow:
        """With its key, or refused where an input cannot be read."""
        try:
            base, adapters = self.base_of(row), self.adapters_of(row)
            pairs = [(self._contents(a.folder).files, a.weight) for a in adapters]
            inputs = row_inputs(row, self._contents(base).files, pairs, self.spelled)
            return PlannedRow(row, key_of(inputs, self.spelled))
        except (LoraExportError, OSError) as error:
            return _refused(PlannedRow(row, ""), error)

    def base_of(self, row: FleetRow) -> Path:
        return _found(self.models[row.model])

    def adapters_of(self, row: FleetRow) -> list[AdapterChoice]:
        return [_found(self.choices[a]) for a in row.adapters]

    def finished(self, planned: PlannedRow) -> PlannedRow:
        """With its base and its needs, if it is to be done; or refused by what headers show."""
        if planned.state is not None:
            return planned
        row = planned.row
        try:
            base, adapters = self.base_of(row), self.adapters_of(row)
            self._refuse(row, base, adapters)
            weights = self._weights_of(row, base)
            alone = self._why_alone(row, base, adapters)
        except (LoraExportError, OSError) as error:
            return _refused(planned, error)
        base_key = "" if alone else self._base_key(row, base)
        return replace(
            planned,
            alone=alone,
            base_key=base_key,
            nbytes=needs.scratch(row, weights),
            output_bytes=needs.output(row, weights),
        )

    # --- what headers show -----------------------------------------------------------------------------------

    def _refuse(self, row: FleetRow, base: Path, adapters: Sequence[AdapterChoice]) -> None:
        """LoraExportError for what a run of this row would refuse by files, names and headers."""
        options = row.options
        self._once(("base", base), lambda: _refuse_base(base))
        pictures = self._is_pipeline(base)
        if not pictures:
            self._once(("export", base, id(options.export)), lambda: _refuse_export(base, row))
        for text in (options.validation.prompts, options.validation.text, options.export.quantization.calibration):
            if text is not None:
                self._once(("text", text), lambda text=text: _refuse_text(text))  # type: ignore[misc]
        if row.target is not None:
            self._once(("package", row.target, id(options)), lambda: _refuse_package(row))
        for adapter in adapters:
            what = pictures, self._contents(adapter.folder).form
            if what not in self._sound:  # a refusal names this adapter's own files
                _refuse_adapter(adapter.folder, single=pictures)
                self._sound.add(what)

    def _once(self, what: tuple[object, ...], check: Callable[[], None]) -> None:
        """A check that many rows share."""
        if what not in self._checked:
            try:
                check()
                self._checked[what] = None
            except LoraExportError as error:
                self._checked[what] = error
        refused = self._checked[what]
        if refused is not None:
            raise refused

    def _is_pipeline(self, base: Path) -> bool:
        if base not in self._pipelines:
            self._pipelines[base] = is_pipeline(base)
        return self._pipelines[base]

    def _why_alone(self, row: FleetRow, base: Path, adapters: Sequence[AdapterChoice]) -> str:
        """Of adapters that differ in numbers alone it is asked once."""
        from lora_export.workflows.fleet.base import why_alone

        forms = [(self._contents(a.folder).form, a.weight) for a in adapters]
        what = (base, id(row.options), *forms)
        if what not in self._alone:
            self._alone[what] = why_alone(row, base, adapters)
        return self._alone[what]

    def _base_key(self, row: FleetRow, base: Path) -> str:
        what = base, id(row.options.merge), id(row.options.export)
        if what not in self._base_keys:
            self._base_keys[what] = key_of(base_inputs(row.options, self._contents(base).files, self.spelled))
        return self._base_keys[what]

    def _contents(self, place: Path) -> Contents:
        return _found(self.files[place])

    def _weights_of(self, row: FleetRow, base: Path) -> needs.Weights:
        what = (base, row.options.merge)
        if what not in self._weights:
            try:
                self._weights[what] = needs.weights_of(base, row.options.merge)
            except LoraExportError as error:
                self._weights[what] = error
        return _found(self._weights[what])


def _refused(planned: PlannedRow, error: LoraExportError | OSError) -> PlannedRow:
    if isinstance(error, OSError):
        error = InputError(f"the file cannot be read: {error.strerror}", where=error.filename)
    return replace(planned, state="refused", error=error.as_json())


def located_model(model: str, scratch: Path | None) -> Source:
    """The folder of a row's model on this machine. InputError if there is none."""
    return Source(model, _localized(model, scratch)) if "://" in model else resolve(model)


def located_adapter(adapter: str, scratch: Path | None) -> AdapterChoice:
    """The same of one of its adapters, with its weight."""
    if "://" not in adapter:
        return adapter_choices(adapter)[0]
    where, _, tail = adapter.rpartition(":")
    try:
        url, weight = where, float(tail)
    except ValueError:
        url, weight = adapter, 1.0
    return AdapterChoice(_localized(url, scratch), weight, url)


def _localized(url: str, scratch: Path | None) -> Path:
    from lora_export.fleet.stores.inputs import localized

    return localized(url, inputs_folder(scratch))


def inputs_folder(scratch: Path | None) -> Path:
    """Where adapters and bases of object stores are brought, on each node."""
    return (scratch or Path(tempfile.gettempdir())) / f"lora-export-inputs-{os.getuid()}"


def _each(names: Iterable[str], find: Callable[[str], T]) -> dict[str, T | LoraExportError]:
    """Each name, found once; those that lie elsewhere at the same time."""

    def found(name: str) -> T | LoraExportError:
        try:
            return find(name)
        except LoraExportError as error:
            return error

    each = list(dict.fromkeys(names))
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        return dict(zip(each, pool.map(found, each), strict=True))


def _found(one: T | LoraExportError) -> T:
    if isinstance(one, LoraExportError):
        raise one
    return one


def _refuse_adapter(folder: Path, *, single: bool) -> None:
    """single: it may be a file, as image models have them."""
    check_adapter_folder(folder)
    if not single or single_file(folder) is None:
        open_adapter_files(folder)


def _refuse_base(base: Path) -> None:
    from lora_export.checkpoint.pipeline import open_pipeline

    if is_pipeline(base):
        open_pipeline(base)
        return
    check_adapter_folder(base)
    open_checkpoint(base)


def _refuse_export(base: Path, row: FleetRow) -> None:
    from lora_export.onnx_export import check_request
    from lora_export.onnx_export.embedders import as_exported

    export = row.options.export
    config = as_exported(
        {k: v for k, v in open_checkpoint(base).config.items() if k != "quantization_config"}, base
    )
    check_request(config, export.precision, export.provider, export.engine, export.quantization)


def _refuse_text(path: Path) -> None:
    if not path.is_file():
        raise InputError("there is no such file", where=path, expected="a file of UTF-8 text")


def _refuse_package(row: FleetRow) -> None:
    from lora_export.packages.targets import target_named

    assert row.target is not None
    if target_named(row.target).needs_merged and not row.options.merged_folder:
        raise InputError(
            f"for = {row.target!r} with no-merged-folder", expected="a merged folder, which this package is made of"
        )


def to_do(planned: Iterable[PlannedRow]) -> list[PlannedRow]:
    return [p for p in planned if p.state is None]


def disk_at_once(planned: Iterable[PlannedRow], options: FleetOptions) -> int:
    """Scratch of this machine's workers, if the rows that need most come together."""
    from lora_export.fleet.engines.local import default_workers

    workers = options.workers or default_workers()
    return sum(sorted((p.nbytes for p in to_do(planned)), reverse=True)[:workers])
