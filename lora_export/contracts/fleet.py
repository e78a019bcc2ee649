"""A fleet: many adapters of a few bases, as a jobs file names them, and what became of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

from lora_export.choices import Verdict
from lora_export.contracts.figures import Figure
from lora_export.contracts.option import option
from lora_export.contracts.options import StoryOptions
from lora_export.contracts.tool_options import PackageOptions

State = Literal["done", "skipped", "gate", "refused", "died", "timeout"]
STATES: tuple[State, ...] = get_args(State)
KEPT: tuple[State, ...] = ("gate", "refused")  # verdicts that stand until an input, an option or a version changes
Keep = Literal["run", "package", "both"]

# fmt: off

@dataclass(frozen=True)
class FleetOptions:
    """Options of a fleet. Sizes are in bytes, times in seconds."""

    SECTION: ClassVar[str] = "Fleet"
    on: str = option(
        "local", "Where rows are worked on: local (processes of this machine), ray (a cluster that is there, or "
        "one of this machine), or ray://HOST:PORT.", metavar="ENGINE", json=None,
    )
    workers: int | None = option(
        None, "Rows that are worked on at once; the cores are shared out among them.", minimum=1, json=None,
        default_text="one for every two cores, at least one; ray: as many as the cluster has room for",
    )
    shard: str | None = option(
        None, "I/N, counted from 0: only the rows whose key is I modulo N. For indexed jobs of Kubernetes, arrays "
        "of Slurm and the like, with no cluster of ours.", metavar="I/N", default_text="all rows", json=None,
    )
    retries: int = option(2, "How often a row is tried again whose worker died.", minimum=0, maximum=100, json=None)
    timeout: float = option(
        1800.0, "Time for one row, as 90s, 30m or 2h.", unit="seconds", metavar="TIME", default_text="30m",
        json=None,
    )
    scratch: Path | None = option(
        None, "Folder on a disk of each node for work in progress.", metavar="DIR", json=None,
        configurable="command line", default_text="the folder for temporary files",
    )
    disk: int | None = option(
        None, "Scratch that may be in use at once on a node, such as 200GB.", unit="bytes", metavar="SIZE",
        json=None, default_text="nine tenths of what is free there",
    )
    again: Literal["failed", "refused"] | None = option(
        None, "Try rows again that failed a gate (failed), or that were refused.", json=None,
        default_text="their verdict stands until an input, an option or a version changes",
    )

# fmt: on


@dataclass(frozen=True)
class FleetRow:
    """One adapter as the jobs file asks for it, options resolved.

    name: unique, and what a deployment reads; base: its name in the jobs file; model: the base as given (a folder,
    Hub ID or URL); adapters: as given to -a, with weights; target: a runtime to package for; keep: what stays.
    `options.validation.seed` None: a function of the base's key.
    """

    name: str
    base: str
    model: str
    adapters: tuple[str, ...]
    options: StoryOptions = field(default_factory=StoryOptions)
    package: PackageOptions = field(default_factory=PackageOptions)
    target: str | None = None
    keep: Keep = "run"


@dataclass(frozen=True)
class PlannedRow:
    """A row with what headers and hashes tell.

    key: of its object; base_key: of the base's preparation that it shares, "" where it stands alone, and `alone`
    says why; nbytes: scratch that it needs at once; output_bytes: what it will write to the root, about; state:
    None for one that is to be done, else skipped (its object exists) or a verdict that stands; error: of a refused
    row, as `LoraExportError.as_json`.
    """

    row: FleetRow
    key: str
    base_key: str = ""
    alone: str = ""
    nbytes: int = 0
    output_bytes: int = 0
    state: State | None = None
    error: Mapping[str, str | None] | None = None


@dataclass(frozen=True)
class Task:
    """What a worker is asked to do: prepare a base (for `planned.base_key`, with this row as the one that is
    measured), or make a row's object. root: folder or URL; scratch: a folder of the node; threads: cores of the
    worker.
    """

    kind: Literal["base", "row"]
    planned: PlannedRow
    root: str
    scratch: Path
    threads: int = 1


@dataclass(frozen=True)
class RowFigures:
    """What the report of a fleet shows of a row; None where it was not measured.

    survival: least share of the adapter's effect that its exports keep; delta_survival: share of the change that
    the merged weights keep; kl: largest mean KL(merged ‖ export) in nats; ratio: latency merged ÷ base of its
    graph, and its verdict; nbytes: of the object; checks, failed: how many.
    """

    survival: Figure | None = None
    delta_survival: Figure | None = None
    kl: Figure | None = None
    ratio: Figure | None = None
    verdict: Verdict | None = None
    nbytes: int | None = None
    checks: int = 0
    failed: int = 0


@dataclass(frozen=True)
class RowOutcome:
    """What became of a task. attempts: how often a worker took it up; stages: stage → seconds; memory_bytes: peak
    of the worker; worker: which one, for people; report: the page, below the root; place: folder below the root;
    warnings: of its stages.
    """

    name: str
    key: str
    state: State
    kind: Literal["base", "row"] = "row"
    seconds: float = 0.0
    attempts: int = 1
    stages: Mapping[str, float] = field(default_factory=dict)
    figures: RowFigures = field(default_factory=RowFigures)
    error: Mapping[str, str | None] | None = None
    memory_bytes: int = 0
    worker: str = ""
    place: str = ""
    report: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredFile:
    """Of a file in a root: its size and SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """record.json, written last and never over another: the object is whole where it exists.

    files: below `at`, a folder below the record's own ("" for that itself; a store without renames gives every
    attempt its own); inputs: what the key is made of, as `fleet.keys` spells it; outcome: as the worker left it;
    base_key: of the preparation that it shares; claim: in words, what was measured for this graph and when.
    """

    schema_version: int
    key: str
    inputs: Mapping[str, object]
    outcome: RowOutcome
    files: Mapping[str, StoredFile]
    at: str = ""
    base_key: str = ""
    claim: str = ""
    created: str = ""
    tool_version: str = ""


@dataclass(frozen=True)
class FleetResult:
    """What `fleet` left: an outcome a row, in the order of the jobs file, and the bases that were prepared."""

    root: str
    rows: tuple[RowOutcome, ...]
    bases: tuple[RowOutcome, ...] = ()
    seconds: float = 0.0
    totals: Mapping[str, int] = field(init=False)
    exit_code: int = field(init=False)

    def __post_init__(self) -> None:
        counts = {state: sum(r.state == state for r in self.rows) for state in STATES}
        object.__setattr__(self, "totals", counts)
        stopped = counts["refused"] + counts["died"] + counts["timeout"]
        object.__setattr__(self, "exit_code", 1 if stopped else 3 if counts["gate"] else 0)
