"""lora-export fleet on its line: what it prints, its JSON, and its exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lora_export.commands.main import cli
from lora_export.contracts import FleetOptions, FleetResult, FleetRow, PlannedRow, RowOutcome


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["fleet", *words])


def outcomes(*states: Any) -> FleetResult:
    rows = tuple(
        RowOutcome(
            f"r{n}", "k", s, error={"found": "no \x1b[2J luck"} if s == "refused" else None, report="failed/k/r"
        )
        for n, s in enumerate(states)
    )
    return FleetResult("s3://bucket/root/", rows, (), 1.5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `api.fleet` is called with; it returns what is put in front."""
    calls: list[Any] = [outcomes("done")]

    def fleet(*arguments: Any, progress: Any) -> Any:
        calls.append(arguments)
        return calls[0]

    monkeypatch.setattr("lora_export.api.fleet", fleet)
    return calls


def test_fleet_options_reach_the_function(asked: list[Any]) -> None:
    words = "j.csv -o s3://b/r --on ray --workers 3 --shard 1/4 --retries 0 --timeout 2h --scratch /s --disk 200GB"
    assert run(*words.split(), "--again", "refused").exit_code == 0
    options = FleetOptions("ray", 3, "1/4", 0, 7200.0, Path("/s"), 200 * 10**9, "refused")
    assert asked[1:] == [(Path("j.csv"), "s3://b/r", options)]


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (("done", "skipped"), 0),
        (("done", "gate"), 3),
        (("gate", "refused"), 1),
        (("gate", "died"), 1),
        (("timeout",), 1),
        ((), 0),
    ],
)
def test_fleet_exit_code_is_that_of_the_worst_row(states: tuple[str, ...], code: int, asked: list[Any]) -> None:
    asked[0] = outcomes(*states)
    words = run("j.csv", "-o", "root")
    document = run("j.csv", "-o", "root", "--json", "-q")
    assert (words.exit_code, document.exit_code) == (code, code)
    assert "s3://bucket/root/fleet.html" in words.stdout and "\x1b" not in words.stdout
    found = json.loads(document.stdout)
    assert found["exit_code"] == code and [r["state"] for r in found["rows"]] == list(states)
    assert ("refused r1" in words.stdout) == ("refused" in states)


def test_fleet_many_rows_that_failed_are_counted_not_listed(asked: list[Any]) -> None:
    asked[0] = outcomes(*["refused"] * 500)
    said = run("j.csv", "-o", "root").stdout
    assert ["refused", "500"] in [line.split() for line in said.splitlines()]
    assert "… and 480 more" in said and said.count("\n") < 40


@pytest.mark.parametrize("words", [("j.csv",), ("-o", "r"), ("j.csv", "-o", "r", "--workers", "0"),
                                   ("j.csv", "-o", "r", "--again", "done"), ("a", "b", "-o", "r")])  # fmt: skip
def test_fleet_wrong_usage_is_two(words: tuple[str, ...], asked: list[Any]) -> None:
    assert run(*words).exit_code == 2 and len(asked) == 1


def test_fleet_interrupted_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_export.api.fleet", stop)
    assert run("j.csv", "-o", "r").exit_code == 130


def test_fleet_faults_of_the_jobs_file_are_all_told(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("model,adapter,precision\no/b,me/a,int5\no/b,me/b,int6\n")
    for more in ((), ("--dry-run",)):
        found = run(str(jobs), "-o", str(tmp_path / "root"), "--json", *more)
        assert found.exit_code == 1 and not (tmp_path / "root").exists()
        assert "2 faults" in found.stderr and "line 3: precision = 'int6'" in found.stderr
        document = json.loads(found.stdout)
        assert document["error"] == "JobsError" and len(document["faults"]) == 2


def test_fleet_dry_run_tells_states_bytes_and_who_stands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(name: str, **more: Any) -> PlannedRow:
        return PlannedRow(FleetRow(name, "smol", "o/b", ("me/a",)), "k" * 64, **more)

    needs = {"nbytes": 10**9, "output_bytes": 3 * 10**8}
    planned = (
        one("a", base_key="b" * 64, **needs), one("b", base_key="b" * 64, **needs),
        *(one(f"c{n}", alone="gptq rounds it", **needs) for n in range(5)),
        one("d", state="skipped"), one("e", state="gate"),
        one("f", state="refused", error={"found": "no such\nfolder", "where": "x"}),
    )  # fmt: skip
    monkeypatch.setattr("lora_export.api.plan_fleet", lambda *_, **__: planned)
    said = run("j.csv", "-o", str(tmp_path / "root"), "--dry-run", "--workers", "2").stdout
    lines = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in said.splitlines() if "  " in line}
    assert lines["rows"] == "10" and lines["to do"] == "7" and lines["skipped"] == "1" and lines["refused"] == "1"
    assert lines["to write"] == "2,100.0 MB, about" and lines["disk at once"] == "2,000.0 MB, at most"
    assert lines["base smol"] == f"prepared once for 2 rows ({'b' * 12})"
    assert lines["alone"] == "c0, c1, c2 and 2 more: gptq rounds it"
    assert "refused f: no such\\nfolder (x)" in said and not (tmp_path / "root").exists()
    found = json.loads(run("j.csv", "-o", "r", "--dry-run", "--workers", "2", "--json").stdout)
    assert found["totals"] == {"to do": 7, "skipped": 1, "gate": 1, "refused": 1}
    assert (found["output_bytes"], found["disk_bytes"]) == (21 * 10**8, 2 * 10**9)
    assert found["bases"] == {"b" * 64: {"base": "smol", "rows": 2}}
    assert [r["state"] for r in found["rows"]][:2] == ["to do", "to do"] and found["rows"][2]["alone"]
