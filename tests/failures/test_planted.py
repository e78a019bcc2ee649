"""Links and FIFOs at each path that a command reads or writes: nothing outside is changed, read or deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.failures.planted import Scene, check, chosen, unharmed
from tests.failures.scenes import DAILY, SLOW, stock

__all__ = ["stock"]  # a fixture

SAMPLE = 10  # cells of a command that run every day


def run_cells(scene: Scene, inputs: Path, folder: Path, count: int | None) -> int:
    known = unharmed(scene, inputs, folder / "unharmed" / "work")
    found = chosen(known, count)
    for i, (paths, kind) in enumerate(found):
        home = folder / str(i)
        outputs = [p for p in paths if p in known.stable]
        if outputs and not paths[0].startswith("."):  # an output of a run before is replaced
            shutil.copytree(folder / "unharmed" / "work", home / "work")
        else:
            shutil.copytree(inputs, home / "work")
        if scene.name.startswith("switch") and outputs:
            shutil.rmtree(home / "work")
            shutil.copytree(inputs, home / "work")
        check(scene, known, home / "work", home / "outside", paths, kind)
        shutil.rmtree(home)
    return len(found)


@pytest.mark.parametrize("scene", DAILY, ids=lambda s: s.name)
def test_planted_entries_daily_sample_does_no_harm(
    scene: Scene, stock: Callable[[Scene], Path], tmp_path: Path
) -> None:
    assert run_cells(scene, stock(scene), tmp_path, SAMPLE) == SAMPLE


@pytest.mark.slow
@pytest.mark.parametrize("scene", [*DAILY, *SLOW], ids=lambda s: s.name)
def test_planted_entries_do_no_harm(
    scene: Scene, stock: Callable[[Scene], Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("cells", run_cells(scene, stock(scene), tmp_path, None))
