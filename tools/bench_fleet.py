"""What a fleet costs beside the commands that it stands for, and what it needs.

    python tools/bench_fleet.py tiny                  # 40 adapters of each of 2 tiny bases, beside commands in turn
    python tools/bench_fleet.py smollm2 --rows 30     # fp32, int4, beside `merge-and-export --graph-from` in turn
    python tools/bench_fleet.py rerun --rows 1000     # a fleet that is done, run again: seconds, bytes written
    python tools/bench_fleet.py plan --rows 10000     # --dry-run: seconds, peak memory
    python tools/bench_fleet.py memory --rows 6       # two workers on SmolLM2: PSS of all processes, scratch
    python tools/bench_fleet.py engines --rows 60     # Ray beside local, in turn, on rows of 2 s

Results go to benchmarks/results/fleet-NAME-DATE.json. What --work holds of an interrupted run (inputs, and the
commands that are done) is taken over; a fleet's own time is taken from nothing each time. Outputs are removed as
soon as their hashes are known: 30 runs of SmolLM2 would take 32 GB.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.fleet_runs import HERE, TOOL, beside, compared, fleet, jobs_file, loop, made, ran
from tools.processes import circumstances, save, spread

MB = 10**6


# --- what is measured ----------------------------------------------------------------------------------------


def tiny(given: argparse.Namespace) -> dict[str, Any]:
    rows = given.rows or 40
    work = given.work / f"tiny-{rows}"
    made("tiny", work, 2, rows)
    options: dict[str, object] = {
        "text": str(work / "text.txt"), "prompts": str(work / "prompts.txt"), "provider": "cpu",
        "precision": "fp32", "max-time": "2s", "margin": 0.5, "validation-seed": 0,
    }  # fmt: skip
    bases = {f"tiny{b}": (work / f"base{b}", work / f"adapters{b}") for b in range(2)}
    commands = loop(work / "loop", options, bases, graphs=False, most=given.commands)
    jobs = jobs_file(work / "jobs.toml", options, bases)
    run = fleet(jobs, work / "root", work / "scratch", "--workers", given.workers)
    return {
        "beside": beside(run, commands),
        "same": compared(run["rows"], commands),
        "fleet": run,
        "commands": commands,
    }


def smollm2(given: argparse.Namespace) -> dict[str, Any]:
    rows = given.rows or 30
    work = given.work / f"smollm2-{rows}"
    base = made("smol", work, rows)
    bases = {"smol": (base, work / "adapters")}
    found: dict[str, Any] = {}
    for precision in given.precision:
        options: dict[str, object] = {
            "prompts": str(work / "prompts.txt"), "provider": "cpu", "precision": precision,
            "max-time": given.max_time, "validation-seed": 0,
        }  # fmt: skip
        commands = loop(work / f"loop-{precision}", options, bases, graphs=True, most=given.commands)
        jobs = jobs_file(work / f"{precision}.toml", options, bases)
        run = fleet(jobs, work / "root", work / "scratch", "--workers", given.workers)
        found[precision] = {"beside": beside(run, commands), "same": compared(run["rows"], commands), "fleet": run,
                            "commands": commands}  # fmt: skip
    return found


def rerun(given: argparse.Namespace) -> dict[str, Any]:
    work = given.work / "many"
    jobs = many(work, given.rows or 1000)
    root = work / f"root-{given.rows or 1000}"
    made("finish", jobs, root)
    command = [*TOOL, "fleet", jobs, "-o", root, "--json"]
    ran(command)  # writes names and the report
    runs = []
    for _ in range(given.repeat):
        before = tree(root)
        run = ran(command)
        after = tree(root)
        totals = json.loads(run.pop("said"))["totals"]
        written = sum(size for name, (size, _) in after.items() if before.get(name) != after[name])
        runs.append(run | {"totals": totals, "bytes_written": written, "files": len(after)})
    return {"runs": runs, "seconds": spread([r["seconds"] for r in runs])}


def tree(root: Path) -> dict[str, tuple[int, int]]:
    stats = ((p, p.stat()) for p in root.rglob("*") if p.is_file())
    return {str(p): (s.st_size, s.st_mtime_ns) for p, s in stats}


def many(work: Path, rows: int) -> Path:
    base = made("many", work, rows)
    jobs = work / f"jobs-{rows}.csv"
    lines = [f"m{n:05},{base},many/m{n:05}" for n in range(rows)]
    jobs.write_text("\n".join(["name,model,adapter", *lines]) + "\n")
    return jobs


def plan(given: argparse.Namespace) -> dict[str, Any]:
    work = given.work / "many"
    jobs = many(work, given.rows or 10_000)
    runs = []
    for _ in range(given.repeat):
        run = ran([*TOOL, "fleet", jobs, "-o", work / "nothing", "--dry-run", "--json"])
        rows = json.loads(run.pop("said"))
        runs.append(run | {"said_rows": len(rows["rows"])})
    return {
        "runs": runs, "seconds": spread([r["seconds"] for r in runs]),
        "peak_rss_mb": max(r["peak_rss_bytes"] for r in runs) / MB,
    }  # fmt: skip


def memory(given: argparse.Namespace) -> dict[str, Any]:
    rows = given.rows or 6
    work = given.work / f"memory-{rows}"
    base = made("smol", work, rows)
    found: dict[str, Any] = {}
    for precision in given.precision:
        options: dict[str, object] = {
            "prompts": str(work / "prompts.txt"), "provider": "cpu", "precision": precision, "max-time": "5s",
        }  # fmt: skip
        jobs = jobs_file(work / "jobs.toml", options, {"smol": (base, work / "adapters")})
        run = fleet(jobs, work / "root", work / "scratch", "--workers", 2, "--disk", given.disk)
        found[precision] = run | {"disk": given.disk, "peak_pss_gb": run["peak_pss_bytes"] / 1e9}
    return found


def engines(given: argparse.Namespace) -> dict[str, Any]:
    """Rows that compute for 2 s of the processor, by each engine in turn; the engine's start is told apart."""
    rows = given.rows or 60
    arms: dict[str, list[dict[str, float]]] = {"local": [], "ray": []}
    for repetition in range(given.repeat):
        for on in [*arms][:: 1 if repetition % 2 == 0 else -1]:
            with tempfile.TemporaryDirectory(prefix="fleet-engines-") as folder:
                command = [sys.executable, __file__, "--drive", on, rows, given.workers, folder]
                arms[on].append(json.loads(ran(command)["said"].splitlines()[-1]))
            print(f"  {on}: {arms[on][-1]}", file=sys.stderr)

    def ratio(of: Callable[[dict[str, float]], float]) -> dict[str, float]:
        pairs = zip(arms["ray"], arms["local"], strict=True)
        return spread([of(ray) / of(local) for ray, local in pairs])

    return {
        "rows": rows, "arms": arms, "rows_ray_over_local": ratio(lambda r: r["rows"]),
        "all_ray_over_local": ratio(lambda r: r["start"] + r["rows"] + r["end"]),
    }  # fmt: skip


def drive(on: str, rows: int, workers: int, folder: Path) -> None:
    """One engine's seconds for rows of 2 s, in this process."""
    from lora_export.contracts import FleetOptions
    from lora_export.fleet.board import Board
    from lora_export.fleet.driver import drive as driven
    from lora_export.fleet.engines.local import LocalEngine
    from lora_export.fleet.engines.ray import RayEngine
    from lora_export.fleet.stores import opened
    from lora_export.progress import Silent
    from tests.fleet import deeds

    scratch, root = folder / "scratch", str(folder / "root")
    scratch.mkdir()
    planned = [deeds.task(f"compute-{n}", scratch).planned for n in range(rows)]
    engine: Any = (
        LocalEngine(f"{deeds.__name__}:{deeds.compute.__name__}", workers, scratch)
        if on == "local"
        else RayEngine("ray", deeds.compute, workers=workers, root=root)
    )
    at = [time.monotonic()]
    with engine:
        at.append(time.monotonic())
        board = Board(planned, Silent(), len(engine.slots))
        outcomes, _ = driven(
            planned, engine, store=opened(root), root=root, scratch=scratch, options=FleetOptions(), board=board
        )
        at.append(time.monotonic())
    at.append(time.monotonic())
    assert all(o.state == "done" for o in outcomes), outcomes
    print(json.dumps(dict(zip(("start", "rows", "end"), (b - a for a, b in itertools.pairwise(at)), strict=True))))


KINDS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tiny": tiny, "smollm2": smollm2, "rerun": rerun, "plan": plan, "memory": memory, "engines": engines,
}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--rows", type=int, help="adapters (of each base); default: those of the lines above")
    parser.add_argument("--commands", type=int, help="of each base; default: one for each adapter")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="of rerun, plan and engines")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int4"], help="of smollm2 and memory")
    parser.add_argument("--max-time", default="10s", help="of smollm2: of each benchmark")
    parser.add_argument("--disk", default="8GB", help="of memory")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-fleet")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    given.work = given.work.absolute()
    given.work.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(HERE.parent), os.environ.get("PYTHONPATH")) if p)
    found = KINDS[given.kind](given)
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items() if k not in ("work", "save")}
    save(given.save, f"fleet-{given.kind}", {"asked": asked, **found, **circumstances(given.work, given.work)})
    print(json.dumps({k: v.get("beside", {}) | v.get("same", {}) if isinstance(v, dict) and "beside" in v else v
                      for k, v in found.items() if k not in ("fleet", "commands")}, indent=1)[:6000])  # fmt: skip


if __name__ == "__main__":
    main()
