"""A fleet from its jobs file to its report: planned, driven, told."""

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_export.contracts import FleetOptions, FleetResult, PlannedRow, Progress, RowOutcome
from lora_export.errors import InputError
from lora_export.fleet.board import Board, watched
from lora_export.fleet.claims import Claims
from lora_export.fleet.driver import drive, name_it
from lora_export.fleet.engines import Engine
from lora_export.fleet.scratch import sweep
from lora_export.fleet.stores import Store, opened
from lora_export.report.fleet_document import write
from lora_export.workflows.fleet.options import read_rows
from lora_export.workflows.fleet.planning import plan, refuse_occupied

WORK = "lora_export.workflows.fleet.work:carry_out"
_READERS = 16  # names that are looked at at once: an object store takes its time for each


def fleet(jobs: Path, root: str, options: FleetOptions, progress: Progress) -> FleetResult:
    """Do every row of a jobs file that is not done yet, and write the report of all.

    A fleet that is done starts no engine and writes nothing. InputError for a jobs file with faults and an unknown
    engine; OutputError for a store that fails: what is whole by then stays, and the same call goes on from there.
    """
    begun = time.monotonic()
    if options.on not in ("local", "ray") and not options.on.startswith("ray://"):
        raise InputError(f"--on {options.on}", expected="local, ray, or ray://HOST:PORT")
    rows, store = read_rows(jobs), opened(root)
    refuse_occupied(store)
    scratch = (options.scratch or Path(tempfile.gettempdir())).absolute()
    _tidy(store, scratch)
    planned = plan(rows, store, options, progress)
    found = {p.row.name: known(p) for p in planned if p.state is not None}
    _name_all(store, [p for p in planned if p.state == "skipped"])
    worked: tuple[RowOutcome, ...] = ()
    bases: tuple[RowOutcome, ...] = ()
    to_do = [p for p in planned if p.state is None]
    if to_do:
        scratch.mkdir(parents=True, exist_ok=True)
        with engine_for(options, root, scratch, to_do) as engine:
            board = Board(planned, progress, len(engine.slots))
            with watched(board, progress), _saying_how_to_go_on(board, progress):
                worked, bases = drive(
                    planned, engine, store=store, root=root, scratch=scratch, options=options, board=board
                )
    found |= {outcome.name: outcome for outcome in worked}
    result = FleetResult(
        store.where, tuple(found[p.row.name] for p in planned), bases, round(time.monotonic() - begun, 3)
    )
    write(result, planned, store, shard=options.shard)
    return result


def known(planned: PlannedRow) -> RowOutcome:
    """Of a row that needs no work: its object exists, or its verdict stands."""
    assert planned.state is not None
    return RowOutcome(planned.row.name, planned.key, planned.state, error=planned.error)


def engine_for(options: FleetOptions, root: str, scratch: Path, to_do: Sequence[PlannedRow]) -> Engine:
    """The engine that `options.on` names. No more workers than rows."""
    count = len({p.key for p in to_do})
    if options.on == "local":
        from lora_export.fleet.engines.local import LocalEngine

        return LocalEngine(WORK, options.workers, scratch, most=count)
    from lora_export.fleet.engines.ray import RayEngine
    from lora_export.workflows.fleet.work import carry_out

    return RayEngine(options.on, carry_out, workers=options.workers, root=root, needed=local_inputs(to_do))


def local_inputs(rows: Iterable[PlannedRow]) -> tuple[Path, ...]:
    """The folders and files of this machine that rows read: bases, and adapters with or without a weight behind."""
    named = {n for p in rows for n in (p.row.model, *p.row.adapters)}
    paths = (Path(n if Path(n).exists() else n.rpartition(":")[0]) for n in sorted(named) if "://" not in n)
    return tuple(dict.fromkeys(path for path in paths if path.name and path.exists()))


def _tidy(store: Store, scratch: Path) -> None:
    """Remove what drivers and workers left that were killed."""
    sweep(scratch)
    with Claims(store):
        pass


def _name_all(store: Store, rows: Sequence[PlannedRow]) -> None:
    """Have the names of rows that are done lead to their objects, where they do not yet."""
    if rows:
        with ThreadPoolExecutor(min(_READERS, len(rows))) as pool:
            list(pool.map(lambda p: name_it(store, p.row.name, p.key), rows))


@contextlib.contextmanager
def _saying_how_to_go_on(board: Board, progress: Progress) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        progress.warn(f"interrupted at {board.line()}; what is done is kept: the same command goes on from there")
        raise
