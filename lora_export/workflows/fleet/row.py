"""One task of a fleet in a worker: a base prepared, or an adapter's object made, kept and recorded."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export import manifest
from lora_export.contracts import AdapterChoice, PackageOptions, Report, Source, Story, StoryOptions
from lora_export.contracts.fleet import Record, RowFigures, RowOutcome, State, StoredFile, Task
from lora_export.errors import GateFailed, LoraExportError, OutputError, RuntimeUnavailable
from lora_export.fleet.stores.protocol import Store
from lora_export.records import NAME, SCHEMA_VERSION, decoded
from lora_export.storage import disk, sealed
from lora_export.workflows.fleet.clock import Clock

if TYPE_CHECKING:
    from lora_export.workflows.shared_base import SharedBase

REPORT = "report/report.html"
PACKAGE = "package"
# Not verdicts on a row: another try, or another machine, can do it.
NO_VERDICT = (OutputError, RuntimeUnavailable)


@dataclass(frozen=True)
class Given:
    """What a task works on. inputs: what its key is made of; seed: of its validation."""

    base: Source
    adapters: Sequence[AdapterChoice]
    options: StoryOptions
    inputs: Mapping[str, object]


# --- tasks ---------------------------------------------------------------------------------------------------


def prepare_base(task: Task, store: Store, node: Path, clock: Clock) -> RowOutcome:
    """Make bases/KEY, unless it is there. LoraExportError where no row can be exported from this base."""
    from lora_export.workflows.fleet.prepared import fill

    key, place = task.planned.base_key, f"bases/{task.planned.base_key}"
    if store.read(f"{place}/{NAME}") is not None:
        return clock.outcome(task, "skipped", place=place)
    given = _given(task, node, clock)
    stage, work = task.scratch / "base", task.scratch / "work"
    stage.mkdir()
    work.mkdir()
    with disk.unsynced():  # the store sees to what is to last
        claim = fill(stage, work, given.base, given.adapters, given.options, clock)
    shutil.rmtree(work, ignore_errors=True)
    done = clock.outcome(task, "done", place=place, figures=RowFigures(nbytes=_bytes(stage)))
    record = _record(key, given, done, base_key=key, claim=claim)
    first = store.publish(stage, place, record)
    return clock.outcome(task, "done" if first else "skipped", place=place, figures=done.figures)


def make_row(task: Task, store: Store, node: Path, clock: Clock) -> RowOutcome:
    """Make objects/KEY, or failed/KEY with a verdict. What is no verdict is raised: nothing is kept of it then."""
    place = f"objects/{task.planned.key}"
    there = store.read(f"{place}/{NAME}")
    if there is not None:
        earlier = decoded(there, f"{store.where}/{place}/{NAME}")
        return _placed(clock.outcome(task, "skipped", figures=earlier.outcome.figures), place, earlier.at)
    given = _given(task, node, clock)
    shared = None
    if task.planned.base_key:
        from lora_export.workflows.fleet.prepared import opened

        shared = opened(task.planned.base_key, store, node).shared(given.options)
    run = task.scratch / "run"
    try:
        with disk.unsynced():  # the store sees to what is to last
            story = _told(given, run, shared, clock)
            folder = _kept(task, story, run, clock)
    except NO_VERDICT:
        raise
    except GateFailed as error:
        failed = run.with_name(f"{run.name}.failed")
        return _verdict(task, store, given, clock, "gate", error, failed)
    except LoraExportError as error:
        return _verdict(task, store, given, clock, "refused", error, None)
    clock.stage("publish: the object")
    figures = replace(figures_of(story), nbytes=_bytes(folder))
    done = _placed(clock.outcome(task, "done", figures=figures), place, "")
    claim = next((n for n in story.benchmark.notes if "same file" in n), "") if story.benchmark else ""
    base_key = task.planned.base_key
    hashes = _sealed(folder)
    record = _record(task.planned.key, given, done, hashes, base_key=base_key, claim=claim)
    first = store.publish(folder, place, record)
    if store.read(f"failed/{task.planned.key}/{NAME}") is not None:
        store.remove(f"failed/{task.planned.key}")
    outcome = clock.outcome(task, "done" if first else "skipped", figures=figures)
    return _placed(outcome, place, _attempt(store, place, task))


def _told(given: Given, run: Path, shared: "SharedBase | None", clock: Clock) -> Story:
    from lora_export.pipeline import merge_and_export

    return merge_and_export(given.base, given.adapters, run, given.options, clock, shared, side_by_side=False)


# --- inputs --------------------------------------------------------------------------------------------------


def _given(task: Task, node: Path, clock: Clock) -> Given:
    """The inputs on this machine, which have to be those that were planned, and the options of the run."""
    from lora_export.keys.hashes import Hashes
    from lora_export.keys.inputs import base_inputs, key_of, row_inputs, seed_of
    from lora_export.pipeline import with_provider
    from lora_export.workflows.fleet.planning import located_adapter

    clock.stage("inputs: finding and comparing them with the plan")
    row, planned = task.planned.row, task.planned
    base = _model(row.model, node)
    adapters = [located_adapter(name, node) for name in row.adapters]
    hashes = Hashes()
    files = hashes.of(base.folder)
    if task.kind == "base":
        inputs, wanted = base_inputs(row.options, files), planned.base_key
    else:
        pairs = [(hashes.of(a.folder), a.weight) for a in adapters]
        inputs, wanted = row_inputs(row, files, pairs), planned.key
    if key_of(inputs) != wanted:
        raise OutputError(
            "an input, an option or a version is another one on this machine than when the row was planned",
            where=row.name,
            expected=f"inputs of the key {wanted}",
            next_step="run the same command again, with one version of everything on all machines",
        )
    seed = row.options.validation.seed
    if seed is None:
        seed = seed_of(planned.base_key or planned.key)
    validation = replace(row.options.validation, seed=seed)
    return Given(base, adapters, with_provider(replace(row.options, validation=validation, force=False)), inputs)


@cache
def _model(model: str, node: Path) -> Source:
    """Found once for all rows of this process, as it may lie in a store elsewhere."""
    from lora_export.workflows.fleet.planning import located_model

    return located_model(model, node)


# --- what is kept --------------------------------------------------------------------------------------------


def _kept(task: Task, story: Story, run: Path, clock: Clock) -> Path:
    """The folder of what the row keeps: its run, its package, or both."""
    row = task.planned.row
    if row.target is None:
        return run
    made = _package(run, row.target, row.package, task.scratch, clock)
    if row.keep != "run":
        folder = run
        if row.keep == "package":
            folder = task.scratch / "kept"
            folder.mkdir()
            (run / "report").rename(folder / "report")
            story.merge.certificate.rename(folder / story.merge.certificate.name)
            shutil.rmtree(run)
        made.rename(folder / PACKAGE)
        return folder
    shutil.rmtree(made)
    return run


def _package(run: Path, target: str, options: PackageOptions, scratch: Path, clock: Clock) -> Path:
    from lora_export.workflows.packaging import package

    output = scratch / PACKAGE
    if options.archive is None:
        package(run, target, output, options, clock)
    else:
        output.mkdir()
        package(run, target, output / (options.name or "model"), options, clock)
    return output


def _verdict(
    task: Task,
    store: Store,
    given: Given,
    clock: Clock,
    state: State,
    error: LoraExportError,
    evidence: Path | None,
) -> RowOutcome:
    """Keep a verdict at failed/KEY, with the folder of a failed gate, in place of an earlier one."""
    place = f"failed/{task.planned.key}"
    folder = evidence
    if folder is None or not folder.is_dir():
        folder = task.scratch / "verdict"
        folder.mkdir()
    told = _without_paths(error.as_json(), task.scratch, place)
    outcome = clock.outcome(task, state, error=told, place=place)
    reported = (folder / REPORT).is_file()
    if reported:
        from lora_export.report import load

        figures = figures_of(load(folder / "report"))
        outcome = replace(outcome, report=f"{place}/{REPORT}", figures=figures)
    key, base_key = task.planned.key, task.planned.base_key
    store.publish(
        folder, place, Record(SCHEMA_VERSION, key, given.inputs, outcome, {}, base_key=base_key), again=True
    )
    at = _attempt(store, place, task)
    if not at:
        return outcome
    return _placed(outcome, place, at) if reported else replace(outcome, place=f"{place}/{at}")


def _without_paths(error: Mapping[str, str | None], scratch: Path, place: str) -> dict[str, str | None]:
    """The error without folders of this worker, which nobody finds again."""
    run = str(scratch / "run")
    return {
        name: text and text.replace(f"{run}.failed", place).replace(run, place).replace(f"{scratch}/", "")
        for name, text in error.items()
    }


def _attempt(store: Store, place: str, task: Task) -> str:
    """Where the files of an object lie below its place: a store without renames says so only in the record."""
    raw = store.read(f"{place}/{NAME}") if "://" in task.root else None
    return decoded(raw, f"{store.where}/{place}").at if raw is not None else ""


def _placed(outcome: RowOutcome, place: str, at: str) -> RowOutcome:
    place = f"{place}/{at}" if at else place
    return replace(outcome, place=place, report=f"{place}/{REPORT}")


def _record(
    key: str, given: Given, outcome: RowOutcome, files: Mapping[str, StoredFile] | None = None, **more: str
) -> Record:
    """For the root, which other people read: it names no machine."""
    return Record(SCHEMA_VERSION, key, given.inputs, replace(outcome, worker=""), files or {}, **more)


def _sealed(folder: Path) -> dict[str, StoredFile]:
    """What the run has just hashed for its manifest, so that a store need not read it again."""
    if not (folder / manifest.NAME).is_file():
        return {}
    return {n: StoredFile(f.size, f.sha256) for n, f in manifest.read(folder).files.items()}


def _bytes(folder: Path) -> int:
    return sum(sealed.sizes(folder).values())


def figures_of(story: Story | Report) -> RowFigures:
    """What the report of a fleet shows of a run, or of the report that a failed one left."""
    checked, measured = story.validate, story.benchmark
    survived = checked.adapter_survival if checked else ()
    shares = [float(s.share) for s in survived if s.share is not None]
    lost = [float(s.kl_lost) for s in survived if s.kl_lost is not None]
    ratios = [float(c.ratio) for c in measured.cells if c.ratio is not None] if measured else []
    kept = story.merge.delta_survival if story.merge else None
    return RowFigures(
        survival=min(shares, default=None),
        delta_survival=float(kept) if kept is not None else None,
        kl=max(lost, default=None),
        ratio=max(ratios, default=None),
        verdict=measured.verdict if measured else None,
        checks=len(checked.checks) if checked else 0,
        failed=sum(not c.passed for c in checked.checks) if checked else 0,
    )
