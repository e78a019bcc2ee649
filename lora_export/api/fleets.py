"""Many adapters of a few bases: a fleet from its jobs file, and what it would have to do."""

from pathlib import Path

from lora_export.api.arguments import SILENT, File, Folder
from lora_export.contracts import FleetOptions, FleetResult, PlannedRow, Progress


def fleet(
    jobs: File, root: Folder, options: FleetOptions | None = None, *, progress: Progress = SILENT
) -> FleetResult:
    """Merge, prove, export, measure and package every adapter of a jobs file; go on where an earlier run ended.

    Args:
        jobs: TOML, CSV or JSONL: bases, adapters, and options of all of them, of those of a base, or of one.
        root: Folder or URL of an object store that gets the results; what is whole there is not made again.
        options: The engine, workers, time and retries of a row, scratch, and the shard.
        progress: Receives stages, warnings, and how many rows are done.

    Returns:
        What became of each row, in the order of the jobs file, and `exit_code`. A row that fails stops no other.

    Raises:
        InputError: The jobs file has faults, all of which are named, or the engine is not there.
        OutputError: The root cannot be written, or its credentials are refused.
    """
    from lora_export.workflows.fleet.fleet import fleet as carry_out

    result: FleetResult = carry_out(Path(jobs), str(root), options or FleetOptions(), progress)
    return result


def plan_fleet(
    jobs: File, root: Folder, options: FleetOptions | None = None, *, progress: Progress = SILENT
) -> tuple[PlannedRow, ...]:
    """What `fleet` would do, from headers and hashes alone: the plan that `--dry-run` prints.

    Args:
        jobs: As for `fleet`.
        root: As for `fleet`; it need not exist.
        options: As for `fleet`.
        progress: Receives what is looked at.

    Returns:
        Each row with its state, the base that it shares or why it shares none, and the bytes that it needs.

    Raises:
        InputError: The jobs file has faults.
        OutputError: The store cannot be read.
    """
    from lora_export.fleet.stores.protocol import opened
    from lora_export.workflows.fleet.options import read_rows
    from lora_export.workflows.fleet.planning import plan

    rows, store = read_rows(Path(jobs)), opened(str(root))
    return plan(rows, store, options or FleetOptions(), progress)
