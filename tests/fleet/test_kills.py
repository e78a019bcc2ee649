"""kill -9 and Ctrl-C at random moments: the next run goes on, and nothing is left that nobody knows."""

import json
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from lora_export.fleet.stores import opened
from tests.fleet import driving

KILLS = 50
ROWS = 24
LATEST = 2.5  # seconds after the start of a driver
GONE = 20.0  # seconds for everything to end


def family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers_of(pid: int) -> list[psutil.Process]:
    found = []
    for process in family(pid):
        try:
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


def assert_all_gone(processes: list[psutil.Process], scratch: Path) -> None:
    """None of these, nor any other that uses this scratch."""
    end = time.monotonic() + GONE
    while True:
        left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        for process in psutil.process_iter():
            try:
                if str(scratch) in " ".join(process.cmdline()):
                    left.append(process)
            except psutil.Error:
                pass
        if not left:
            return
        assert time.monotonic() < end, left
        time.sleep(0.05)


def assert_unmixed(root: Path, tmp_path: Path) -> set[str]:
    """Every record's object is whole and its own, and every name leads to one. The keys that are there."""
    store = opened(str(root))
    keys = set(store.records("objects"))
    for key in keys:
        copy = tmp_path / f"copy-{key}-{random.random()}"
        record = store.fetch(f"objects/{key}", copy)
        assert record is not None and record.key == key
        assert (copy / "name").read_text() == key and (copy / "whole").stat().st_size == 1000
    for path in (root / "names").glob("*.json") if (root / "names").is_dir() else ():
        named = json.loads(path.read_bytes())
        assert named["key"] in keys and named["place"] == f"objects/{named['key']}"
    assert {p.name for p in (root / "objects").glob("*") if root.exists()} == keys
    return keys


def finished(root: Path, scratch: Path, tmp_path: Path, log: Path) -> None:
    """Run to the end, and look at everything."""
    driver = driving.started(root, scratch, ROWS, log)
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, out
    keys = assert_unmixed(root, tmp_path)
    assert keys == {p.key for p in driving.rows(ROWS)}
    assert {p.stem for p in (root / "names").iterdir()} == {p.row.name for p in driving.rows(ROWS)}
    assert not list((root / "claims").rglob("*.json"))
    assert not list(scratch.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_driver_killed_at_random_moments_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    draw = random.Random(int(number))
    kills = hits = roots = 0
    root = scratch = log = tmp_path
    while kills < (KILLS if number == signal.SIGKILL else KILLS // 5):
        if root == tmp_path or len(opened(str(root)).records("objects")) == ROWS:
            if roots:
                finished(root, scratch, tmp_path, log)
            roots += 1
            root, scratch, log = (tmp_path / f"{what}{roots}" for what in ("root", "scratch", "log"))
        driver = driving.started(root, scratch, ROWS, log)
        if kills % 2:  # in the middle of rows, however long a start takes here
            while not list(scratch.glob("*")) and driver.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0.0, 1.0))
        else:
            time.sleep(draw.uniform(0.2, LATEST))
        children = family(driver.pid)
        if driver.poll() is None:
            driver.send_signal(number)
            kills += 1
            hits += bool(children)
        driver.communicate(timeout=60)
        assert_all_gone(children, scratch)
        if root.exists():
            assert_unmixed(root, tmp_path)
    finished(root, scratch, tmp_path, log)
    (tmp_path / "figures.txt").write_text(
        f"{kills} kills of drivers by {number.name}, {hits} of them with workers, {roots} fleets"
    )
    assert hits > kills // 3


@pytest.mark.slow
def test_workers_killed_at_random_moments_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKES_SECONDS", "0.3")
    draw = random.Random(1)
    kills = fleets = 0
    states: Counter[str] = Counter()
    while kills < KILLS:
        fleets += 1
        root, scratch, log = (tmp_path / f"{what}{fleets}" for what in ("root", "scratch", "log"))
        driver = driving.started(root, scratch, ROWS, log)
        while driver.poll() is None:
            time.sleep(draw.uniform(0.1, 0.8))
            if kills < KILLS and (workers := workers_of(driver.pid)):
                draw.choice(workers).kill()
                kills += 1
        out = driver.communicate()[0].splitlines()
        assert driver.returncode == 0, out
        told = {k: int(v) for k, v in re.findall(r"'(\w+)': (\d+)", out[-1])}
        states.update(told)
        assert sum(told.values()) == ROWS  # each done, or told
        assert len(assert_unmixed(root, tmp_path)) == ROWS - told.get("died", 0)
        assert not list(scratch.iterdir())
        finished(root, scratch, tmp_path, log)
    (tmp_path / "figures.txt").write_text(f"{kills} kills of workers, {fleets} fleets, rows: {dict(states)}")


def test_driver_interrupted_keeps_what_is_done(tmp_path: Path) -> None:
    root, scratch, log = tmp_path / "root", tmp_path / "scratch", tmp_path / "log"
    driver = driving.started(root, scratch, 200, log)
    end = time.monotonic() + GONE
    while not list(root.glob("objects/*/record.json")):
        assert time.monotonic() < end
        time.sleep(0.02)
    children = family(driver.pid)
    driver.send_signal(signal.SIGINT)
    assert driver.communicate(timeout=60)[0].count("done") == 0 and driver.returncode != 0
    assert_all_gone(children, scratch)
    assert 0 < len(assert_unmixed(root, tmp_path)) < 200
    assert not list((root / "claims").rglob("*.json")) and not list(scratch.iterdir())
