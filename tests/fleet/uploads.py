"""Uploads that are killed: ROOT FOLDER TURNS SEED. Run as a program, which uses no store itself before it
forks: obstore's threads do not survive that."""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import obstore.store  # noqa: F401  # before the forks, not in each of them

from lora_export.errors import LoraExportError
from lora_export.fleet.stores import opened
from tests.fleet.roots import made, record

LARGE = {"onnx/model.onnx": 9_000_000, "merged/config.json": 20, "report/report.html": 40_000}
SMALL = {"onnx/model.onnx": 300_000, "merged/config.json": 20, "report/report.html": 40_000}


def sizes(turn: int) -> dict[str, int]:
    """Every fourth object has a file that goes up in parts."""
    return LARGE if turn % 4 == 0 else SMALL


def key(turn: int) -> str:
    return f"{turn:064x}"


def uploading(root: str, folder: Path, turn: int, writer: str) -> int:
    source = made(folder / f"{turn}-{writer}", writer, sizes(turn))
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(LoraExportError):
            opened(root).publish(source, f"objects/{key(turn)}", record(writer, key(turn)))
        os._exit(0)
    return pid


UNDISTURBED = (1_000_000, 1_000_001)  # turns whose uploads are timed


def main(root: str, folder: str, turns: str, seed: str) -> None:
    """Two writers of each object, killed one after another within one and a half times what an upload takes."""
    chance, usual = random.Random(int(seed)), {}
    for turn in UNDISTURBED:
        began = time.monotonic()
        os.waitpid(uploading(root, Path(folder), turn, "undisturbed"), 0)
        usual[turn % 4 == 0] = time.monotonic() - began
    for turn in range(int(turns)):
        pids = [uploading(root, Path(folder), turn, f"killed-{i}") for i in range(2)]
        for pid in pids:
            time.sleep(chance.random() * 0.75 * usual[turn % 4 == 0])
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
