"""Tasks as a driver would give them to a worker, in one process."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.checkpoint.sources import adapter_choices
from lora_export.contracts import StoryOptions
from lora_export.contracts.fleet import FleetRow, PlannedRow, RowOutcome, Task
from lora_export.keys.hashes import Hashes
from lora_export.keys.inputs import base_inputs, key_of, row_inputs
from lora_export.workflows.fleet import prepared, work
from lora_export.workflows.fleet.base import why_alone


def options(precision: str = "fp32", **export: Any) -> StoryOptions:
    """Of a run whose benchmark is one short cell."""
    made = StoryOptions()
    return replace(
        made,
        export=replace(made.export, precision=precision, provider="cpu", **export),  # type: ignore[arg-type]
        benchmark=replace(made.benchmark, max_seconds=2.0, shapes=((1, 8),), margin=0.5),
    )


def with_short_texts(how: StoryOptions, folder: Path) -> StoryOptions:
    """That a validation takes a second."""
    (folder / "text.txt").write_text("a few words that are read by every model here, and then again. " * 4)
    (folder / "prompts.txt").write_text("a few words\n")
    texts = replace(how.validation, text=folder / "text.txt", prompts=folder / "prompts.txt")
    return replace(how, validation=texts)


def planned(base: Path, adapter: Path, how: StoryOptions | None = None, **row: Any) -> PlannedRow:
    made = FleetRow(adapter.name, "base", str(base), (str(adapter),), how or options(), **row)
    hashes, choices = Hashes(), adapter_choices(str(adapter))
    files = hashes.of(base)
    alone = why_alone(made, base, choices)
    key = key_of(row_inputs(made, files, [(hashes.of(c.folder), c.weight) for c in choices]))
    return PlannedRow(made, key, "" if alone else key_of(base_inputs(made.options, files)), alone)


@contextmanager
def node(folder: Path) -> Iterator[Path]:
    """The scratch of a node, whose base this process lets go at the end."""
    try:
        yield folder
    finally:
        if prepared._current is not None:
            prepared._current.close()
            prepared._current = None


def carry_out(kind: Any, one: PlannedRow, root: Path, scratch: Path) -> RowOutcome:
    """As an engine does: in a new folder, of which nothing may be left."""
    folder = scratch / "lora-export-fleet-worker" / f"task-{kind}"
    folder.mkdir(parents=True)
    outcome = work.carry_out(Task(kind, one, str(root), folder))
    assert not list(folder.iterdir()), "something is left in the scratch of a task"
    shutil.rmtree(folder)
    return outcome
