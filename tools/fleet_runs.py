"""Whole fleets, and the commands that they stand for one after another: seconds, memory, figures, hashes."""

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.processes import spread

HERE = Path(__file__).resolve().parent
TOOL = [sys.executable, "-m", "lora_export"]
KEPT = 100_000  # bytes of a file that may stay on the disk
VERDICT = (0, 3)  # exit codes that a row may have: passed, or failed a gate


# --- processes -----------------------------------------------------------------------------------------------


def made(*given: object) -> Path:
    """Inputs; the folder of the base."""
    command = [sys.executable, HERE / "fleet_inputs.py", *map(str, given)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Path(said.splitlines()[-1]) if said else Path()


def ran(command: Sequence[object], codes: Sequence[int] = (0,)) -> dict[str, Any]:
    """One command: seconds, in all and by stage (the first word of what it says of itself), peak, exit code."""
    started = at = time.monotonic()
    stages: dict[str, float] = {}
    name = "start"
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"• (\w+)", line):
                stages[name] = stages.get(name, 0.0) + time.monotonic() - at
                name, at = found[1], time.monotonic()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stages[name] = stages.get(name, 0.0) + time.monotonic() - at
        out.seek(0)
        answer = out.read()
    if process.returncode not in codes:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nended with {process.returncode}:\n{''.join(said)[-4000:]}"
        )
    return {
        "seconds": time.monotonic() - started, "stages": stages, "code": process.returncode,
        "peak_rss_bytes": usage.ru_maxrss * 1024, "said": answer,
    }  # fmt: skip


class Watched:
    """Peaks of a process and all that it starts, and of a folder, looked at twice a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pss, self.scratch = folder, 0, 0
        self.samples: list[tuple[float, int, int]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watched":
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            pss = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    pss += process.memory_full_info().pss
            used = size_of(self.folder)
            self.pss, self.scratch = max(self.pss, pss), max(self.scratch, used)
            self.samples.append((round(time.monotonic() - self._started, 1), pss, used))


def size_of(folder: Path) -> int:
    """Blocks on the disk, in bytes."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


# --- what a row left, and the same of a command --------------------------------------------------------------


def of_run(run: Path) -> dict[str, Any]:
    """Figures and hashes of a run's folder, which is removed. The manifest of one that failed a gate has none."""
    report = json.loads((run / "report" / "report.json").read_text())
    certificate = next(run.rglob("lora_export_certificate.json"), None)
    manifest = run / "manifest.json"
    files = json.loads(manifest.read_text())["files"] if manifest.exists() else {}
    hashes = {n: f["sha256"] for n, f in files.items() if n.startswith(("merged/", "onnx/"))}
    shutil.rmtree(run)
    return {"checks": checks_of(report), "files": hashes, "certified": certificate is not None}


def checks_of(report: dict[str, Any]) -> dict[str, list[Any]]:
    """Name of each check → value, threshold, passed. The benchmark's are not among them: they are measured once."""
    checks = (report.get("validate") or {}).get("checks", [])
    return {f"{c['name']} {i}": [c["value"], c["threshold"], c["passed"]] for i, c in enumerate(checks)}


class Kept:
    """Watches a root: figures and hashes of every object that is whole; its large files are removed then."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: dict[str, dict[str, Any]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Kept":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._over.wait(2):
            self.look()

    def look(self) -> None:
        for place in ("objects", "failed"):
            for record in (self.root / place).glob("*/record.json"):
                if record.parent.name in {r["key"] for r in self.rows.values()}:
                    continue
                document = json.loads(record.read_text())
                folder = record.parent / document["at"]
                report = json.loads(next(folder.rglob("report.json")).read_text())
                hashes = {
                    n: f["sha256"] for n, f in document["files"].items() if n.startswith(("merged/", "onnx/"))
                }
                self.rows[document["outcome"]["name"]] = {
                    "key": record.parent.name, "state": document["outcome"]["state"], "files": hashes,
                    "checks": checks_of(report), "seconds": document["outcome"]["seconds"],
                    "stages": document["outcome"]["stages"],
                }  # fmt: skip
                for path in folder.rglob("*"):
                    if path.is_file() and path.stat().st_size > KEPT:
                        path.unlink()


def compared(fleet: dict[str, Any], commands: dict[str, Any]) -> dict[str, Any]:
    """Rows whose checks, figures or bytes are not those of the command. Workers have fewer threads than a command,
    which adds up in another order: the largest relative difference of a figure tells how much that is."""
    both = [n for n in commands if n in fleet]
    checks = {n: differing(fleet[n]["checks"], commands[n]["checks"]) for n in both}
    files = {
        n: sorted(f for f, _ in {*fleet[n]["files"].items()} ^ {*commands[n]["files"].items()})
        for n in both
        if commands[n]["files"] and fleet[n]["state"] == "done"
    }
    return {
        "rows": len(both),
        "missing": sorted(set(commands) - set(fleet)),
        "other_names_or_verdicts": {n: c for n, (c, _) in checks.items() if c},
        "largest_relative_difference": max((far for _, far in checks.values()), default=0.0),
        "rows_with_files": len(files),
        "other_files": sorted({f for names in files.values() for f in names}),
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], float]:
    """Checks that only one has, or of which only one passed; and how far the others' figures are apart at most."""
    names = {*one, *other}
    odd = sorted(n for n in names if n not in one or n not in other or one[n][2] != other[n][2])
    far = 0.0
    for name in names - set(odd):
        for mine, theirs in zip(one[name][:2], other[name][:2], strict=True):
            if mine != theirs and isinstance(mine, float | int) and isinstance(theirs, float | int):
                far = max(far, abs(mine - theirs) / max(abs(mine), abs(theirs)))
    return odd, far


# --- fleets and loops ----------------------------------------------------------------------------------------


def jobs_file(path: Path, options: dict[str, object], bases: dict[str, tuple[Path, Path]]) -> Path:
    """bases: name → the base's folder, the folder with its adapters."""
    lines = [f"{k} = {json.dumps(v)}" for k, v in options.items()]
    lines += [f"[base.{n}]\nmodel = {json.dumps(str(base))}" for n, (base, _) in bases.items()]
    lines += [f'[[adapters]]\nbase = "{n}"\nglob = {json.dumps(f"{a}/*")}' for n, (_, a) in bases.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def fleet(jobs: Path, root: Path, scratch: Path, *more: object) -> dict[str, Any]:
    """A whole fleet from nothing."""
    for folder in (root, scratch):
        shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    command = [*TOOL, "fleet", jobs, "-o", root, "--scratch", scratch, "--json", *more]
    with Kept(root) as kept, Watched(scratch) as watched:
        run = ran(command, VERDICT)
    document = json.loads(run.pop("said"))
    return run | {
        "rows": kept.rows, "totals": document.get("totals"), "peak_pss_bytes": watched.pss,
        "peak_scratch_bytes": watched.scratch, "samples": watched.samples, "bases": document.get("bases"),
    }  # fmt: skip


def loop(
    work: Path,
    options: dict[str, object],
    bases: dict[str, tuple[Path, Path]],
    *,
    graphs: bool,
    most: int | None = None,
) -> dict[str, Any]:
    """Commands one after another. graphs: each base's first run gives the others its graph (--graph-from); most: of
    each base, where all would take too long."""
    work.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {}
    for base, adapters in bases.values():
        first = work / f"first-{base.name}"
        for adapter in sorted(adapters.iterdir())[:most]:
            note = work / f"{adapter.name}.json"
            if not note.exists():
                out = work / "out"
                for old in (out, out.with_name("out.failed")):
                    shutil.rmtree(old, ignore_errors=True)
                # A graph that is taken has its precision.
                how = (
                    {k: v for k, v in options.items() if k != "precision"} if graphs and first.exists() else options
                )
                said = [word for k, v in how.items() for word in (f"--{k}", str(v))]
                source = ["--graph-from", first] if graphs and first.exists() else []
                run = ran(
                    [*TOOL, "merge-and-export", "-b", base, "-a", adapter, "-o", out, *said, *source], VERDICT
                )
                left = out if run["code"] == 0 else out.with_name("out.failed")
                if graphs and not first.exists():
                    shutil.copytree(left / "onnx", first)
                del run["said"]
                note.write_text(json.dumps(run | of_run(left)))
                print(f"  {adapter.name}: {run['seconds']:.1f} s", file=sys.stderr)
            done[adapter.name] = json.loads(note.read_text())
    return done


def beside(fleet_run: dict[str, Any], commands: dict[str, Any]) -> dict[str, Any]:
    """The fleet against the loop: in all, without what is measured once, and validations alone. Where fewer
    commands than rows ran, their mean stands for the others."""
    each = len(fleet_run["rows"]) / len(commands)
    total = sum(c["seconds"] for c in commands.values()) * each
    measured = sum(c["stages"].get("benchmark", 0.0) for c in commands.values()) * each
    validations = [c["stages"]["validate"] for c in commands.values() if "validate" in c["stages"]]
    rows = fleet_run["rows"].values()
    own = [r["stages"]["validate"] for r in rows if "validate" in r["stages"]]
    return {
        "commands_run": len(commands), "commands_seconds": total, "fleet_seconds": fleet_run["seconds"],
        "times_faster": total / fleet_run["seconds"],
        "commands_benchmark_seconds": measured,
        "times_faster_without_benchmarks": (total - measured) / fleet_run["seconds"],
        "command_validation": spread(validations), "row_validation": spread(own),
        "row_validation_share": statistics.median(own) / statistics.median(validations),
    }  # fmt: skip
