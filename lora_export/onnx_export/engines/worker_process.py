"""The process behind `isolated.Worker`: reads one request a line, and answers each with a line: done, or a refusal.

What the requests print goes to the log, as does a traceback: the first one ends the process.
"""

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
        for number, line in enumerate(sys.stdin.buffer):
            if number:
                gc.collect()  # what the request before has left
            message = json.loads(line)
            try:
                importlib.import_module(message["module"]).main(message["request"])
                answer = b"done"
            except LoraExportError as error:
                answer = json.dumps(error.as_json()).encode()
            sys.stdout.flush()
            answers.write(answer + b"\n")


if __name__ == "__main__":
    main()
