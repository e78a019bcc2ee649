"""The interpreters that run the sample program of a package."""

import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from lora_export.errors import InputError


class Interpreter(ABC):
    """Reads a program from its standard input. command: as a person starts it, in a shell."""

    command: ClassVar[str]

    @abstractmethod
    def start(self, runtime: Path | None, empty: Path) -> tuple[list[str], Path]:
        """The command, and the folder to start it in. runtime: as in `verify --runtime`; empty: an empty folder.

        InputError for a runtime that is not one.
        """


class Python(Interpreter):
    """runtime: an interpreter, such as that of a virtual environment."""

    command = "python -"

    def start(self, runtime: Path | None, empty: Path) -> tuple[list[str], Path]:
        if runtime is not None and not runtime.is_file():
            raise InputError("no such interpreter", where=runtime, expected="--runtime VENV/bin/python")
        return [str(runtime.absolute() if runtime else sys.executable), "-"], empty


class Node(Interpreter):
    """runtime: a folder in which the libraries are installed."""

    command = "node --input-type=module"

    def start(self, runtime: Path | None, empty: Path) -> tuple[list[str], Path]:
        if runtime is not None and not (runtime / "node_modules").is_dir():
            raise InputError(
                "this folder has no node_modules",
                where=runtime,
                expected="a folder in which transformers.js is installed",
                next_step=f"npm install --prefix {runtime} @huggingface/transformers",
            )
        return [*self.command.split(), "-"], runtime or empty
