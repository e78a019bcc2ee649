"""What engines run: one task in a worker process that is kept for many.

Light at the top: torch and all else that is heavy is imported inside a task, which a timeout watches.
"""

import contextlib
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from lora_export.contracts.fleet import RowOutcome, Task
from lora_export.errors import LoraExportError
from lora_export.fleet.scratch import PREFIX
from lora_export.fleet.stores.protocol import opened as opened_store
from lora_export.storage.disk import emptied
from lora_export.storage.memory import freed
from lora_export.workflows.fleet.clock import Clock, reset_peak, spare_imports


def carry_out(task: Task) -> RowOutcome:
    """Do a task and keep its result in the root.

    Verdicts (done, skipped, gate, refused) are in the root when this returns. Anything else that happens to a row
    is `died` with the error: nothing of it is kept, and another try may succeed. A base that no row can be exported
    from is `refused`, of which nothing is kept either.
    """
    from lora_export.workflows.fleet.row import NO_VERDICT, make_row, prepare_base

    clock = Clock()
    reset_peak()
    try:
        with _temporary_files(task.scratch):
            store = opened_store(task.root)
            work = prepare_base if task.kind == "base" else make_row
            return work(task, store, node_of(task.scratch), clock)
    except LoraExportError as error:
        final = task.kind == "base" and not isinstance(error, NO_VERDICT)
        return clock.outcome(task, "refused" if final else "died", error=error.as_json())
    except Exception as error:
        traceback.print_exc()
        return clock.outcome(task, "died", error=_told(error))
    finally:
        for left in task.scratch.iterdir() if task.scratch.is_dir() else ():
            emptied(left)
        freed()
        spare_imports()


def node_of(scratch: Path) -> Path:
    """The scratch of the node, which its workers share. Engines give each task a folder in one of its worker."""
    return scratch.parent.parent if scratch.parent.name.startswith(PREFIX) else scratch.parent


@contextlib.contextmanager
def _temporary_files(scratch: Path) -> Iterator[None]:
    """Have everything temporary lie in the task's scratch, where it counts, and goes with it."""
    before, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    folder = scratch / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable


def _told(error: Exception) -> dict[str, str | None]:
    text = " ".join(str(error).split())[:400]
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return {
        "error": type(error).__name__, "found": found, "where": None, "tensor": None, "expected": None,
        "next": "run the same command again; if it stays, its worker's log has the whole story",
    }  # fmt: skip
