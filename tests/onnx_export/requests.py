"""Requests for the engines' process that import nothing and do as they are told."""

import inspect
import time
from pathlib import Path
from typing import Any

# Whether it is imported before standard input is read.
WARM = not any("message" in frame.frame.f_locals for frame in inspect.stack())


def main(request: dict[str, Any]) -> None:
    """Tell that it has begun, and whether the process had imported it by then; go on for as long as it says."""
    if WARM:
        Path(request["begun"]).with_suffix(".warm").touch()
    Path(request["begun"]).touch()
    time.sleep(request["seconds"])
    Path(request["begun"]).with_suffix(".done").touch()
