"""The process behind `isolated.Worker`: reads one request a line, and answers each with a line: done, or a refusal.

Its arguments are modules that it imports before the first request. What the requests print goes to the log, as does
a traceback: the first one ends the process.
"""

import contextlib
import gc
import importlib
import json
import os
import sys

from lora_export.errors import LoraExportError


def main() -> None:
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0) as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        gc.disable()  # a short-lived process that keeps its million objects
        for module in sys.argv[1:]:
            with contextlib.suppress(Exception):  # who needs it will tell
                importlib.import_module(module)
        for line in sys.stdin.buffer:
            message = json.loads(line)
            try:
                called = importlib.import_module(message["module"]).main
                gc.freeze()  # what was imported lasts
                called(message["request"])
                answer = b"done"
            except LoraExportError as error:
                answer = json.dumps(error.as_json()).encode()
            sys.stdout.flush()
            answers.write(answer + b"\n")
            gc.collect()  # while nobody waits


if __name__ == "__main__":
    main()
