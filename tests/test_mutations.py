"""Would the tests notice? Every deliberate fault, put into a copy of the project, makes its test fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project; pytest finds the package beside the tests there, not the installed one."""
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("lora_export", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_mutations_apply(mutation: Mutation) -> None:
    """The fault can be put in at exactly one place, and the README tells of it."""
    assert (ROOT / "lora_export" / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    readme = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert f"| {mutation.name} | `{mutation.caught_by.removeprefix('tests/')}` |" in readme


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name for m in MUTATIONS])
def test_mutations_are_caught(mutation: Mutation, copy: Path) -> None:
    path = copy / "lora_export" / mutation.file
    sound = path.read_text(encoding="utf-8")
    assert _pytest(copy, mutation) == 0, "the test fails without the fault"
    path.write_text(sound.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        assert _pytest(copy, mutation) == 1, "the fault goes unnoticed"
    finally:
        path.write_text(sound, encoding="utf-8")


def _pytest(folder: Path, mutation: Mutation) -> int:
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.caught_by]
    # The path, for tests that run the command line as a process: it is to find the copy, too.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode
