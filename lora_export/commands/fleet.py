"""lora-export fleet: every adapter of a jobs file."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk, megabytes, table
from lora_export.contracts.fleet import STATES, FleetOptions
from lora_export.escape import shown

if TYPE_CHECKING:
    from lora_export.contracts import FleetResult, PlannedRow

_MOST = 20  # rows that are told one by one; JSON has them all


@derive.command(
    "fleet",
    click.Argument(["jobs"], type=FOLDER),
    Given("-o", "--output", required=True, metavar="ROOT", configurable="command line",
          help="Folder, or URL of an object store (s3://BUCKET/PATH), that gets the results."),
    derive.options_of(FleetOptions),
    Given("--dry-run", is_flag=True, configurable="command line",
          help="Read headers and hashes, print what would be done, write nothing."),
)  # fmt: skip
def fleet(talk: Talk, jobs: Path, output: str, dry_run: bool, **given: Any) -> None:
    """Merge, prove, export and package every adapter of JOBS, each once, on one machine or many.

    JOBS is a TOML file with bases and adapters, or CSV or JSONL with a row an adapter. Every option of
    merge-and-export and of package is a key there: for all rows, for those of a base, or for one. A base is
    exported and answers once for all of its adapters; each of them has the same checks as in merge-and-export.

    \b
        precision = "int4"
        for = "genai"                      # the runtime to package for
        [base.smol]
        model = "HuggingFaceTB/SmolLM2-135M-Instruct"
        [[adapters]]                       # a row for each folder, named after it
        base = "smol"
        glob = "adapters/*"
        [[adapter]]
        name = "acme"
        base = "smol"
        adapter = "me/acme-lora@v2"
        text = "texts/acme.txt"

    ROOT keeps results by what they are made of. The same command goes on after an interruption, and makes again
    only what depends on a file, an option or a version that changed. A row that fails stops no other.

    \b
        lora-export fleet jobs.toml -o ./fleet --dry-run
        lora-export fleet jobs.toml -o ./fleet
        lora-export fleet jobs.csv -o s3://models/fleet --on ray --workers 16
        lora-export fleet jobs.csv -o /shared/fleet --shard 3/8

    Exit code: 0 every row is done or was done before; 3 a gate failed and all else is done; 1 a row was refused,
    died or took too long; 2 wrong usage; 130 interrupted.
    """
    from lora_export import api

    options = derive.build(FleetOptions, given)
    if dry_run:
        planned = api.plan_fleet(jobs, output, options, progress=talk.progress)
        talk.result(_plan_document(planned, output, options), _plan_words(planned, options))
        return
    result = api.fleet(jobs, output, options, progress=talk.progress)
    talk.result(result, _result_words(result, options.shard))
    if result.exit_code:
        sys.exit(result.exit_code)


# --- what would be done ------------------------------------------------------------------------------------------


def _plan_document(planned: Sequence["PlannedRow"], root: str, options: FleetOptions) -> dict[str, Any]:
    from lora_export.workflows.fleet.planning import disk_at_once, to_do

    return {
        "dry_run": True,
        "root": root,
        "totals": _states(planned),
        "output_bytes": sum(p.output_bytes for p in to_do(planned)),
        "disk_bytes": disk_at_once(planned, options),
        "bases": _shared(planned),
        "rows": [
            {
                "name": p.row.name,
                "base": p.row.base,
                "state": p.state or "to do",
                "key": p.key,
                "base_key": p.base_key,
                "alone": p.alone,
                "scratch_bytes": p.nbytes,
                "output_bytes": p.output_bytes,
                "error": p.error,
            }
            for p in planned
        ],
    }


def _states(planned: Sequence["PlannedRow"]) -> dict[str, int]:
    """How many rows are in each state, those that are to be done first."""
    found = Counter(str(p.state or "to do") for p in planned)
    return {state: found[state] for state in ("to do", *STATES) if found[state]}


def _shared(planned: Sequence["PlannedRow"]) -> dict[str, dict[str, Any]]:
    """Key of a base's preparation → the base, and how many rows of this run share it."""
    shared: dict[str, dict[str, Any]] = {}
    for p in planned:
        if p.base_key:
            shared.setdefault(p.base_key, {"base": p.row.base, "rows": 0})["rows"] += 1
    return shared


def _plan_words(planned: Sequence["PlannedRow"], options: FleetOptions) -> str:
    from lora_export.workflows.fleet.planning import disk_at_once, to_do

    rows = [("rows", str(len(planned))), *((state, str(count)) for state, count in _states(planned).items())]
    rows += [
        ("to write", megabytes(sum(p.output_bytes for p in to_do(planned))) + ", about"),
        ("disk at once", megabytes(disk_at_once(planned, options)) + ", at most"),
    ]
    rows += [
        (f"base {one['base']}", f"prepared once for {one['rows']} rows ({key[:12]})")
        for key, one in _shared(planned).items()
    ]
    reasons: dict[str, list[str]] = {}
    for p in planned:
        if p.alone:
            reasons.setdefault(p.alone, []).append(p.row.name)
    rows += [("alone", f"{_some(names)}: {why}") for why, names in reasons.items()]
    refused = [p for p in planned if p.state == "refused"]
    lines = [f"refused {shown(p.row.name)}: {_why(p.error)}" for p in refused[:_MOST]]
    if len(refused) > _MOST:
        lines.append(f"… and {len(refused) - _MOST} more, which --json lists")
    return "\n".join([table([*rows, ("dry run", "nothing was written")]), *lines])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _why(error: Mapping[str, str | None] | None) -> str:
    told = error or {}
    return shown(f"{told.get('found')}" + (f" ({told['where']})" if told.get("where") else ""))


# --- what was done -----------------------------------------------------------------------------------------------


def _result_words(result: "FleetResult", shard: str | None) -> str:
    from lora_export.report.fleet_document import PAGE, folder_of

    page = f"{result.root.rstrip('/')}/{folder_of(shard)}{PAGE}"
    bad = [r for r in result.rows if r.state not in ("done", "skipped")]
    rows = [(state, str(count)) for state, count in result.totals.items() if count or state == "done"]
    rows += [("time", f"{result.seconds:.1f} s"), ("report", page)]
    told = [(f"{r.state} {r.name}", _why(r.error) if r.error else r.report) for r in bad[:_MOST]]
    more = [f"… and {len(bad) - _MOST} more, which the report lists"] if len(bad) > _MOST else []
    return "\n".join([table([*rows, *told]), *more])
