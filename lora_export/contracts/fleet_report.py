"""fleet.json: what became of every adapter of a fleet, and what changed since the run before."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_export.choices import Verdict
from lora_export.contracts.figures import Figure
from lora_export.contracts.fleet import State

FLEET_SCHEMA_VERSION: Literal[1] = 1


@dataclass(frozen=True)
class FleetReportRow:
    """One adapter: what was asked for, what became of it, and where that lies.

    base: its name in the jobs file, "" where only a record is known; adapters: Hub IDs, URLs without secrets, and
    names of folders; base_key: of the preparation that it shares, "" where it stood alone, and `alone` says why;
    place: folder below the root; report: the page below the root; seconds, attempts, stages, memory_bytes: of the
    run that made it, which may be an earlier one; made: when, in ISO 8601. Figures as in `RowFigures`.
    """

    name: str
    base: str
    adapters: tuple[str, ...]
    state: State
    key: str
    base_key: str = ""
    alone: str = ""
    place: str = ""
    report: str = ""
    seconds: Figure = 0.0
    attempts: int = 1
    stages: Mapping[str, Figure] = field(default_factory=dict)
    memory_bytes: int = 0
    survival: Figure | None = None
    delta_survival: Figure | None = None
    kl: Figure | None = None
    ratio: Figure | None = None
    verdict: Verdict | None = None
    nbytes: int | None = None
    checks: int = 0
    failed: int = 0
    error: Mapping[str, str | None] | None = None
    warnings: tuple[str, ...] = ()
    made: str = ""


@dataclass(frozen=True)
class FleetPreparation:
    """What rows of a base share. rows: how many; claim: what was measured for its graph, in words."""

    key: str
    state: State
    rows: int
    seconds: Figure = 0.0
    stages: Mapping[str, Figure] = field(default_factory=dict)
    place: str = ""
    claim: str = ""
    error: Mapping[str, str | None] | None = None


@dataclass(frozen=True)
class FleetReportBase:
    """A base of the jobs file. model: as adapters of a row are named; totals: rows by state."""

    name: str
    model: str
    totals: Mapping[str, int]
    preparations: tuple[FleetPreparation, ...] = ()


@dataclass(frozen=True)
class FleetChange:
    """A difference of a row from the run before: a row that is new or gone, another key, another state, or a
    survival that moved. before, after: the key, the state or the share, "" where there is none."""

    name: str
    what: Literal["new", "gone", "key", "state", "survival"]
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class FleetReportBefore:
    """The run that the changes are counted from."""

    created: str
    tool_version: str
    totals: Mapping[str, int]


@dataclass(frozen=True)
class FleetReport:
    """root: folder or URL, without secrets; shard: I/N of a part of the fleet, "" for all; joined: the shards that
    the rows are from, of which some may be missing; seconds: of the run, or of its longest shard; created: in
    ISO 8601. A run that changes nothing leaves the report of the run before as it is.
    """

    schema_version: Literal[1]
    tool_version: str
    created: str
    root: str
    seconds: Figure
    totals: Mapping[str, int]
    bases: tuple[FleetReportBase, ...]
    rows: tuple[FleetReportRow, ...]
    changes: tuple[FleetChange, ...] = ()
    previous: FleetReportBefore | None = None
    shard: str = ""
    joined: tuple[str, ...] = ()


@dataclass(frozen=True)
class FleetPages:
    """What `report` wrote for a fleet: folders or URLs, and rows by state."""

    html: str
    markdown: str
    metrics: str
    document: str
    totals: Mapping[str, int]
