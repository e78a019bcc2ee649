"""What each runtime made of each package, one cell of the table in docs/how-to/runtimes.md at a time.

A test opens a cell, compares, and says what it compared. The cell is kept as a JSON document, whether the test
passes or fails; tools/runtimes.py collects them into a result file.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from tests.consumers.environments import CACHE

MODELS = ("decoder", "encoder", "encoder-decoder", "speech", "vision-language", "pipeline")
PLACE = Path(os.environ.get("LORA_EXPORT_ANSWERS", CACHE / "answers"))


@dataclass
class Cell:
    """consumer, version: of the runtime, as its authors write it; package: merged, or what --for says; model: one
    of MODELS; name: of the model; compared: in words ("192 of 192 tokens of 6 prompts"); figure: the largest
    difference of numbers, where numbers are compared; command: what a person types to load the package; said: of a
    refusal or a failure."""

    consumer: str
    version: str
    package: str
    model: str
    name: str
    command: str
    result: Literal["ok", "refused", "failed"] = "failed"
    compared: str = ""
    figure: float | None = None
    said: str = ""
    date: str = ""

    def same(self, compared: str, figure: float | None = None) -> None:
        """The runtime answers as the unmerged model does."""
        self.result, self.compared, self.figure = "ok", compared, figure

    def refused(self, said: str) -> None:
        """The runtime, or `package`, says that it does not take this, in these words."""
        self.result, self.said = "refused", said


@contextmanager
def cell(consumer: str, version: str, package: str, model: str, name: str, command: str) -> Iterator[Cell]:
    """A cell to fill. It is kept as failed, with the error, unless the test says otherwise and passes."""
    assert model in MODELS, model
    made = Cell(consumer, version, package, model, name, command)
    try:
        yield made
        assert made.result != "failed", "the test compared nothing"
    except BaseException as error:
        made.result, made.said = "failed", (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise
    finally:
        made.date = datetime.now(UTC).date().isoformat()
        PLACE.mkdir(parents=True, exist_ok=True)
        file = PLACE / f"{consumer}--{package}--{model}--{name}.json".replace("/", "-").replace(" ", "-")
        file.write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
