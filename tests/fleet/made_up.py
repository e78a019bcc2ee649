"""Fleets that nobody ran: plausible rows by the thousand, for pages and for speed."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export import records
from lora_export.contracts.fleet import FleetResult, FleetRow, PlannedRow, Record, RowFigures, RowOutcome, State

Made = tuple[FleetResult, tuple[PlannedRow, ...]]

BASES = {
    "smol": "HuggingFaceTB/SmolLM2-135M-Instruct@7e27bd9",
    "qwen": "Qwen/Qwen3-0.6B",
    "bert": "google-bert/bert-base-uncased",
}
ERROR = {
    "error": "AdapterError", "found": "a tensor holds NaN", "where": "adapters/x/adapter_model.safetensors",
    "tensor": "base_model.model.layers.3.q_proj.lora_A.weight", "expected": "finite numbers",
    "next": "train it again, or --allow-nonfinite if that is intended",
}  # fmt: skip


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


WEIGHTS = (960, 20, 12, 5, 3)  # of the states in which rows end


def fleet(
    count: int, seed: int = 0, weights: tuple[int, ...] = WEIGHTS
) -> tuple[FleetResult, tuple[PlannedRow, ...]]:
    draw = random.Random(seed)
    outcomes, planned = [], []
    for at in range(count):
        base = draw.choices(list(BASES), (8, 3, 1))[0]
        owner = draw.choice(("acme", "globex", "initech", "umbrella", "hooli"))
        name = f"{owner}-{draw.choice(('support', 'legal', 'sales'))}-{at:05}"
        row = FleetRow(name, base, BASES[base], (f"{owner}/{name}-lora@{key(name)[:7]}",))
        alone = "the adapter brings a head of its own" if base == "bert" else ""
        state: State = draw.choices(("done", "gate", "refused", "died", "timeout"), weights)[0]
        planned.append(PlannedRow(row, key(name), "" if alone else key(base), alone))
        outcomes.append(_outcome(planned[-1], state, draw))
    prepared = [
        RowOutcome(
            key(b), key(b), "done", "base", 190.0, stages={"export": 8.0, "reference": 120.0, "benchmark": 62.0}
        )
        for b in BASES
        if b != "bert"
    ]
    return FleetResult("/srv/fleet/nightly", tuple(outcomes), tuple(prepared), 0.31 * count), tuple(planned)


def _outcome(plan: PlannedRow, state: State, draw: random.Random) -> RowOutcome:
    stages = {"merge": draw.lognormvariate(0.2, 0.2), "export": draw.lognormvariate(-0.3, 0.2),
              "validate": draw.lognormvariate(3.2, 0.3)}  # fmt: skip
    measured = state in ("done", "gate")
    figures = RowFigures(
        survival=(draw.betavariate(40, 25) if state == "gate" else draw.betavariate(400, 8)) if measured else None,
        delta_survival=draw.betavariate(900, 2) if measured else None,
        kl=draw.lognormvariate(-6 if state == "done" else -2, 0.8) if measured else None,
        verdict="equivalent_by_structure" if measured else None,
        nbytes=int(draw.gauss(5.4e8, 4e6)) if state == "done" else None,
        checks=31 if measured else 0,
        failed=2 if state == "gate" else 0,
    )
    folder = "objects" if state == "done" else "failed"
    place = f"{folder}/{plan.key}" if measured else ""
    return RowOutcome(
        plan.row.name, plan.key, state, seconds=sum(stages.values()) if measured else 0.0,
        attempts=3 if state == "died" else draw.choices((1, 2), (97, 3))[0], stages=stages if measured else {},
        figures=figures, error=ERROR if state in ("refused", "died", "timeout") else None,
        memory_bytes=int(9e8), worker="node-1/0", place=place,
        report=f"{place}/report/report.html" if place else "",
    )  # fmt: skip


class FolderPlace:
    """What the report asks of a store, on a folder, with what was written."""

    def __init__(self, folder: Path, where: str = "") -> None:
        self.folder, self.where, self.written = folder, where or str(folder), []

    def read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def replace(self, name: str, content: bytes) -> None:
        self.written.append(name)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def records(self, place: str) -> dict[str, bytes]:
        return {p.parent.name: p.read_bytes() for p in (self.folder / place).glob("*/record.json")}


def with_row(made: Made, at: int, *, plan: dict[str, Any] | None = None, **changed: Any) -> Made:
    """The same fleet with one other outcome."""
    rows, planned = list(made[0].rows), list(made[1])
    rows[at] = replace(rows[at], **changed)
    planned[at] = replace(planned[at], **(plan or {}))
    return replace(made[0], rows=tuple(rows)), tuple(planned)


def again(made: Made) -> Made:
    """The outcomes and the plan of a run that finds all of it there."""
    rows, planned = [], []
    for outcome, plan in zip(*(made[0].rows, made[1]), strict=True):
        state = "skipped" if outcome.state == "done" else outcome.state
        stands = state in ("skipped", "gate", "refused")
        rows.append(RowOutcome(outcome.name, outcome.key, state, error=outcome.error))
        told = {"state": state, "base_key": "", "alone": "", "error": outcome.error} if stands else {}
        planned.append(replace(plan, **told))  # type: ignore[arg-type]
    return FleetResult(made[0].root, tuple(rows)), tuple(planned)


def renamed(row: FleetRow) -> FleetRow:
    return replace(row, adapters=("elsewhere/the-same-files",))


def finished(made: Made) -> Made:
    """Without rows that are tried in every run."""
    keep = [at for at, row in enumerate(made[0].rows) if row.state not in ("died", "timeout")]
    return replace(made[0], rows=tuple(made[0].rows[k] for k in keep)), tuple(made[1][k] for k in keep)


def keep(store: Any, outcome: RowOutcome, plan: PlannedRow, created: str = "") -> None:
    """What a worker leaves of a row: record and name."""
    record = Record(1, outcome.key, {}, outcome, {}, base_key=plan.base_key, created=created)
    store.create(f"{outcome.place}/record.json", records.encoded(records.finished(record, {})))
    if outcome.state == "done":
        named = json.dumps({"key": outcome.key, "place": outcome.place}).encode()
        store.replace(f"names/{outcome.name}.json", named)
