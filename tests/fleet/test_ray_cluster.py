"""A fleet on three raylets: what reaches the nodes, what a lost node costs, and kills at random moments."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_export import api
from lora_export.contracts import FleetOptions
from lora_export.errors import InputError, RuntimeUnavailable
from lora_export.fleet.engines.ray import RayEngine
from lora_export.fleet.engines.ray_worker import ROOT_ID
from tests.fleet import deeds
from tests.fleet.cluster import Raylets, raylets
from tests.fleet.test_equal import assert_equal
from tools import fleet_kills

pytestmark = pytest.mark.slow
SOON = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            patch.delenv(name)
        with raylets(3) as there:
            for name, value in there.variables.items():
                patch.setenv(name, value)
            yield there


def seen(engine: RayEngine, name: str, scratch: Path, slot: int = 0) -> str:
    return engine.slots[slot].submit(deeds.task(name, scratch), SOON).result(SOON).worker


@pytest.mark.parametrize("client", [False, True])
def test_nodes_see_the_drivers_root_and_variables_and_logs_have_no_secret(
    cluster: Raylets, client: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EXPORT_PLACE", "a place")
    monkeypatch.setenv("LORA_EXPORT_A_TOKEN", "open-sesame")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "open-sesame")
    if client:
        monkeypatch.delenv("RAY_ADDRESS")
    root = tmp_path / "root"
    with RayEngine(cluster.client if client else "ray", deeds.tell, root=str(root)) as engine:
        assert len(engine.slots) == 3 and engine.threads == 1
        for name, value in (("PLACE", "a place"), ("A_TOKEN", "open-sesame")):
            assert seen(engine, f"show-LORA_EXPORT_{name}", tmp_path / "s") == value
        assert seen(engine, "show-AWS_SECRET_ACCESS_KEY", tmp_path / "s") == "open-sesame"
        assert {seen(engine, "cores", tmp_path / "s", slot=i) for i in range(2)} == {"0", "1"}
        assert {p.name for p in root.rglob("*") if p.is_file()} == {ROOT_ID}
    logs = Path(cluster.cluster.head_node.get_session_dir_path())
    assert list(logs.rglob("*.log")) and "open-sesame" not in "".join(
        p.read_text(errors="replace") for p in logs.rglob("*") if p.is_file()
    )


def test_node_that_does_not_see_what_is_needed_is_refused(cluster: Raylets, tmp_path: Path) -> None:
    missing = tmp_path / "base-of-the-driver-alone"
    with pytest.raises(InputError, match=r"does not see .*base-of-the-driver-alone"):
        RayEngine("ray", deeds.tell, root=str(tmp_path / "root"), needed=[missing]).__enter__()


def test_driver_without_the_token_is_refused(
    cluster: Raylets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = os.environ["RAY_ADDRESS"]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RuntimeUnavailable, match="no Ray cluster"):
        RayEngine("ray", deeds.tell).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", address)


def test_lost_node_costs_its_task_and_its_slot_goes_on_elsewhere(cluster: Raylets, tmp_path: Path) -> None:
    with RayEngine("ray", deeds.tell, root=str(tmp_path / "root")) as engine:
        running = [slot.submit(deeds.task("sleep-6", tmp_path / "s"), SOON) for slot in engine.slots]
        time.sleep(2)
        cluster.kill(0)
        states = [future.result(SOON) for future in running]
        died = [o for o in states if o.state == "died"]
        assert sorted(o.state for o in states) == ["died", "done", "done"]
        assert died[0].error and "node" in str(died[0].error["found"])
        assert [seen(engine, "sleep-0", tmp_path / "s", slot=i) for i in range(3)]
        cluster.add()


@pytest.mark.parametrize(("kind", "kills"), [("worker", 4), ("raylet", 1), ("driver", 2)])
def test_random_kills_lose_nothing(cluster: Raylets, kind: str, kills: int, tmp_path: Path) -> None:
    found = fleet_kills.KINDS[kind](tmp_path, kills, random.Random(7), cluster)
    assert found.kills >= (1 if kind == "driver" else kills) and found.fleets
    assert not found.wrong


def test_kills_judge_sees_a_mixed_object_and_a_lost_row(tmp_path: Path) -> None:
    """The check of the test above can fail."""
    root = tmp_path / "root"
    given = deeds.task("row0", tmp_path / "scratch", root)
    assert deeds.write(given).state == "done"
    fleet = object.__new__(fleet_kills.Fleet)
    fleet.root, fleet.scratch = root, tmp_path / "scratch"
    assert not list(fleet.mixed())
    part = next((root / "objects" / "key-of-row0").rglob("part3/bytes"))
    part.chmod(0o644)
    part.write_bytes(b"another attempt" * 2000)
    assert list(fleet.mixed())


def jobs(folder: Path) -> Path:
    import torch

    from tests.validation.conftest import save_adapter, save_base

    base = save_base(folder / "base", torch.float32)
    for i in range(3):
        save_adapter(base, folder / "adapters" / f"a{i}", seed=1 + i)
    (folder / "text.txt").write_text("a few words that are read by every model here, and then again. " * 4)
    (folder / "prompts.txt").write_text("a few words\n")
    (folder / "jobs.toml").write_text(
        'text = "text.txt"\nprompts = "prompts.txt"\nprovider = "cpu"\nmax-time = "2s"\nmargin = 0.5\n'
        "batch = 1\nprompt-length = 8\n"
        '[base.tiny]\nmodel = "base"\n[[adapters]]\nbase = "tiny"\nglob = "adapters/*"\n'
    )
    return folder / "jobs.toml"


def test_ray_leaves_the_bytes_that_local_leaves(cluster: Raylets, tmp_path: Path) -> None:
    file, roots = jobs(tmp_path), {on: tmp_path / on for on in ("local", "ray")}
    for on, root in roots.items():
        result = api.fleet(file, root, FleetOptions(on=on, workers=2))
        assert [row.state for row in result.rows] == ["done"] * 3, result.rows
    keys = [row.key for row in result.rows]
    for key in keys:
        assert_equal(roots["ray"] / "objects" / key, roots["local"] / "objects" / key)
