"""Several drivers on one root: whoever claims a row does it, and a claim ends with its holder."""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lora_export.fleet import claims as claiming
from lora_export.fleet.claims import Claims
from lora_export.fleet.stores import opened
from tests.fleet import driving


def test_claims_one_holder_at_a_time(tmp_path: Path) -> None:
    store = opened(str(tmp_path / "root"))
    with Claims(store) as one, Claims(store) as two:
        assert one.take("k") and one.take("k") and not two.take("k") and two.take("other")
        one.give_back("k")
        assert two.take("k") and not one.take("k")
    assert not list((tmp_path / "root").rglob("*.json"))


def dead_driver(root: Path) -> None:
    """Claim k in a process that is killed."""
    code = (
        "import os, sys; from lora_export.fleet.claims import Claims; from lora_export.fleet.stores import opened\n"
        "c = Claims(opened(sys.argv[1])); assert c.take('k'); os.kill(os.getpid(), 9)\n"
    )
    variables = os.environ | {"PYTHONPATH": str(driving.REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code, str(root)], env=variables, check=False).returncode == -9


def test_claims_of_a_killed_driver_are_taken_over_and_tidied(tmp_path: Path) -> None:
    root = tmp_path / "root"
    dead_driver(root)
    assert (root / "claims/k.json").exists()
    with Claims(opened(str(root))) as claims:
        assert claims.take("k")
    assert not list(root.rglob("*.json"))
    dead_driver(root)
    with Claims(opened(str(root))):
        pass
    assert not list(root.rglob("*.json"))


def test_claims_of_another_machine_count_while_its_lease_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    store = opened(str(root))
    clock = [1000.0]
    monkeypatch.setattr(claiming.time, "monotonic", lambda: clock[0])
    lease = {"host": f"not-{socket.gethostname()}", "pid": 1, "started": 1, "beat": 0}
    store.replace("claims/drivers/far.json", json.dumps(lease).encode())
    store.create("claims/k.json", b'{"holder": "far"}')
    with Claims(store) as claims:
        assert not claims.take("k")
        clock[0] += 59
        assert not claims.take("k")
        store.replace("claims/drivers/far.json", json.dumps(lease | {"beat": 1}).encode())
        assert not claims.take("k")
        clock[0] += 59
        assert not claims.take("k")
        clock[0] += 2
        assert claims.take("k")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"holder": "../../x"}', b'{"holder": 7}'])
def test_claims_that_nobody_understands_hold_nothing(tmp_path: Path, content: bytes) -> None:
    store = opened(str(tmp_path / "root"))
    store.create("claims/k.json", content)
    with Claims(store) as claims:
        assert claims.take("k")


def test_claims_driver_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "BEAT", 0.01)
    store = opened(str(tmp_path / "root"))
    with Claims(store) as claims:
        claims.take("k")
        (lease,) = (tmp_path / "root/claims/drivers").iterdir()
        end = time.monotonic() + 20
        while json.loads(lease.read_bytes())["beat"] < 2:
            assert time.monotonic() < end


@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_two_drivers_do_every_row_once(tmp_path: Path, count: int) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    drivers = [driving.started(root, tmp_path / f"scratch{i}", count, log) for i in range(2)]
    said = [d.communicate(timeout=120)[0].splitlines()[-1] for d in drivers]
    assert [d.returncode for d in drivers] == [0, 0], said
    work = Counter(" ".join(line.split()[:2]) for line in log.read_text().splitlines())
    names = {p.row.name for p in driving.rows(count)}
    assert work == Counter({"base base0": 1, "base base1": 1} | {f"row {n}": 1 for n in names})
    for planned in driving.rows(count):
        named = json.loads((root / f"names/{planned.row.name}.json").read_bytes())
        assert named["key"] == planned.key
        assert (root / "objects" / planned.key / "name").read_text() == planned.key
    assert not list((root / "claims").rglob("*.json"))
    assert not list(tmp_path.glob("scratch*/*"))
