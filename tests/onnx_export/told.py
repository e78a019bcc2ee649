"""What an engine's process says of itself: a module for `Worker.run`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lora_export.errors import AdapterError


def main(request: dict[str, Any]) -> None:
    sys.stdout.write(f"printed by {request['do']}\n")
    match request["do"]:
        case "tell":
            said = {"pid": os.getpid(), "folder": str(Path.cwd()), "environment": dict(os.environ)}
            Path(request["to"]).write_text(json.dumps(said))
        case "refuse":
            raise AdapterError("not this adapter", where="here")
        case "fail":
            raise KeyError("no such weight")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
