"""Every figure that a GPU has to give, the most valuable first, on one machine, in one command, without a network.

    PYTHONPATH=$PWD python tools/gpu_suite.py --out RESULTS                     # all steps, on CUDA
    PYTHONPATH=$PWD python tools/gpu_suite.py --out RESULTS --budget 560        # those that fit; again: the others
    PYTHONPATH=$PWD python tools/gpu_suite.py --list                            # the steps, and what they take
    PYTHONPATH=$PWD python tools/gpu_suite.py --out RESULTS --sizes small       # on a CPU
    PYTHONPATH=$PWD python tools/gpu_suite.py --out RESULTS --stand-in          # CUDA played by the CPU: no figures

What is made lies in --work, and results in --out (--archive keeps them in one file): the same command goes on
where the last one ended, on another machine with what that one brought back (--earlier ARCHIVE). A step that would
not fit into --budget is left out and named, and so is one that fails; the others run. tools/gpu_carry.py takes all
of it to a machine without a network.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from gpu_steps import SIZES, Command, Made, Plan, Step
from processes import HERE, circumstances

ROOT = HERE.parent
# What the project depends on and no step imports.
UNUSED = frozenset({"accelerate", "bitsandbytes", "cyclonedx-python-lib", "pebble", "sentencepiece"})
SLOWER = 3  # the status of a gate that failed, which is a result
LOG = "log.txt"


class Missed(Exception):
    """Why a step has no result."""


class Suite:
    """suite.json of the results holds what each step took, and why one has no result (missed), or goes without an
    arm (absent)."""

    def __init__(self, plan: Plan, budget: float | None, stand_in: bool) -> None:
        self.plan, self.stand_in = plan, stand_in
        self.ends = None if budget is None else time.monotonic() + budget
        self.made = plan.everything_made()
        self.record = plan.results / "suite.json"
        known = json.loads(self.record.read_text(encoding="utf-8")) if self.record.is_file() else {}
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.missed: dict[str, str] = {}
        self.absent: dict[str, str] = {}

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if result_of(self.plan, step):
                print(f"{step.name}: there already", flush=True)
                continue
            try:
                self._carry_out(step)
            except Missed as why:
                self.missed[step.name] = str(why)
                print(f"{step.name}: left out, {why}", flush=True)
            self.save()

    def _carry_out(self, step: Step) -> None:
        needed = self._needed([*step.needs, *step.extra])
        expected = step.seconds + sum(made.seconds for made in needed)
        if expected > self.left:
            raise Missed(f"it takes about {expected:.0f} s, and {self.left:.0f} s are left")
        self._make(step.needs)
        first, *rest = step.commands
        for name, words in step.extra.items():
            try:
                self._make((name,))
                first = (*first, *words)
            except Missed as why:
                self.absent[name] = str(why)
                print(f"{step.name} goes without {name}: {why}", flush=True)
        step = replace(step, commands=(first, *rest))
        try:
            self._timed(step, self.plan.result(step.name))
        except Missed:
            if (found := result_of(self.plan, step)) is not None:  # what a step left that failed is no result
                broken = self.plan.result(f"{step.name}.broken")
                shutil.rmtree(broken, ignore_errors=True)
                found.rename(broken)
            raise

    def _make(self, names: Sequence[str]) -> None:
        for made in self._needed(names):
            self._timed(made, self.plan.at(made.name))

    @property
    def left(self) -> float:
        return float("inf") if self.ends is None else self.ends - time.monotonic()

    def _needed(self, names: Sequence[str]) -> list[Made]:
        """What is not there yet of `names` and of what those need, in the order in which it is made."""
        found: dict[str, Made] = {}
        for name in names:
            if not self.plan.at(name).exists():
                made = self.made[name]
                found |= {m.name: m for m in self._needed(made.needs)} | {name: made}
        return list(found.values())

    def _timed(self, what: Made | Step, output: Path) -> None:
        if isinstance(what, Made) and output.exists():
            return
        print(f"{what.name} …", end=" ", flush=True)
        started = time.monotonic()
        output.parent.mkdir(parents=True, exist_ok=True)
        for command in what.commands:
            self._command(what.name, command, output)
        taken = round(time.monotonic() - started, 1)
        self.seconds[what.name] = taken
        print(f"{taken:.1f} s", flush=True)
        if isinstance(what, Step):
            self._describe(what, taken)

    def _command(self, name: str, command: Command, output: Path) -> None:
        if "result.json" in str(command[-1]) or any("result.xml" in str(word) for word in command):
            output.mkdir(parents=True, exist_ok=True)
        limit = None if self.ends is None else max(1.0, self.left)
        with (self.plan.results / LOG).open("ab") as log:
            log.write(f"\n=== {name}: {' '.join(map(str, command))}\n".encode())
            log.flush()
            start = log.tell()
            try:
                done = subprocess.run(
                    [sys.executable, *command], stdout=log, stderr=log, timeout=limit, cwd=ROOT, check=False
                )
            except subprocess.TimeoutExpired:
                raise Missed(f"{name} was stopped at the end of the budget") from None
        if done.returncode not in (0, SLOWER):
            with (self.plan.results / LOG).open("rb") as log:
                log.seek(start)
                told = log.read().decode(errors="replace").strip().splitlines()
            raise Missed(f"{name} failed with status {done.returncode}: {' '.join(told[-6:])[-600:]}")

    def _describe(self, step: Step, taken: float) -> None:
        """Machine, versions and date beside the raw result of each step."""
        about = {"step": step.name, "about": step.about, "seconds": taken, "commands": _words(step.commands)}
        self._write(result_of(self.plan, step) / "step.json", about)  # type: ignore[operator]

    def save(self) -> None:
        self._write(self.record, {"seconds": self.seconds, "without_result": self.missed, "absent": self.absent})

    def _write(self, path: Path, about: dict[str, Any]) -> None:
        from lora_export.storage.sealed import write_json

        how = {"provider": self.plan.provider, "sizes": self.plan.sizes, "weights": "from a seed"}
        played = {"stand_in": "CUDA was played by the CPU: no figure here is one of a GPU"} if self.stand_in else {}
        write_json(path, about | how | played | circumstances(self.plan.work, self.plan.results))


def prepare_children(stand_in: bool) -> None:
    """For all processes that are started: this checkout, and CUDA's libraries or their stand-in. pip has installed
    the libraries beside whatever this Python imports, and they are on no path."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    if stand_in:
        sys.path.insert(0, str(ROOT))
        from tests.stand_in.played import variables

        os.environ.update(variables())
        return
    found = {str(library.parent) for folder in sys.path for library in Path(folder).glob("nvidia/*/lib/*.so.*")}
    before = filter(None, [os.environ.get("LD_LIBRARY_PATH")])
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join([*sorted(found), *before])


def result_of(plan: Plan, step: Step) -> Path | None:
    """The folder of a step that is done."""
    folder = plan.result(step.name)
    places = (folder, folder.with_name(f"{folder.name}.failed"))
    return next((p for p in places if any(p.glob("report.json")) or any(p.glob("result.*"))), None)


def _words(commands: Sequence[Command]) -> list[list[str]]:
    return [[word.name if isinstance(word, Path) else word for word in command] for command in commands]


# --- results -------------------------------------------------------------------------------------------------


def lines(folder: Path) -> Iterator[str]:
    """What a step found, in a few lines."""
    report = folder / "report.json"
    if report.is_file():
        bench = json.loads(report.read_text(encoding="utf-8"))["benchmark"]
        yield (f"  graphs identical: {bench['graph_identical']}; every heavy node on the provider: "
               f"{bench['provider_verified']}; verdict: {bench['verdict']}")  # fmt: skip
        for cell in bench["cells"]:
            graph = ", CUDA graph" if cell["cuda_graph"] else ""
            yield f"  {cell['phase']} b{cell['batch']} s{cell['prompt']}{graph}: {cell['verdict']}"
            yield from (_arm(name, arm) for name, arm in cell["arms"].items())
        yield from (f"  note: {note}" for note in bench["notes"])
    elif (folder / "result.json").is_file():
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        for name, value in found.items():
            shown = {k: v for k, v in value.items() if k != "nodes"} if isinstance(value, dict) else value
            yield f"  {name}: {shown}"
    else:
        text = (folder / "result.xml").read_text(encoding="utf-8")
        yield "  " + text[text.index("<testsuite ") + 1 : text.index(">", text.index("<testsuite "))]


def _arm(name: str, arm: dict[str, Any]) -> str:
    ratio = f"  {arm['ratio']:.4f} [{arm['ci_low']:.4f}, {arm['ci_high']:.4f}]" if arm["ratio"] else ""
    return f"    {name:<10} {arm['p50']['ms']:9.3f} ms{ratio}"


def archived(results: Path, archive: Path) -> None:
    """All results in one file, for machines that bring few files back."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as file:
        for path in sorted(p for p in results.rglob("*") if p.is_file()):
            file.add(path, path.relative_to(results).as_posix())
    print(f"{archive}: {archive.stat().st_size / 2**20:.1f} MiB")


def restored(archive: Path, results: Path) -> None:
    """Results of an earlier call; a file that is there stays."""
    with tarfile.open(archive) as file:
        for member in file.getmembers():
            if member.isfile() and not (results / member.name).exists():
                file.extract(member, results, filter="data")


# --- what has to be there ------------------------------------------------------------------------------------


def missing() -> list[str]:
    """What the project depends on and is not here, or too old; ONNX Runtime by either of its names."""
    from packaging.requirements import Requirement

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    told = []
    for requirement in map(Requirement, wanted):
        if requirement.name in UNUSED or (requirement.marker and not requirement.marker.evaluate()):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True):
                continue
        told.append(f"{requirement.name}{requirement.specifier}")
    return told


def main() -> None:
    options = parse()
    if absent := missing():
        sys.exit(f"not installed here, or too old: {' '.join(absent)}")
    prepare_children(options.stand_in)
    suite = Suite(planned(options), options.budget, options.stand_in)
    plan = suite.plan
    plan.results.mkdir(parents=True, exist_ok=True)
    for archive in options.earlier:
        restored(archive, plan.results)
    steps = [s for s in plan.steps() if not options.only or s.name in options.only]
    if options.stand_in:
        steps = [s for s in steps if s.name != "tests"]
        print("tests: not with a played card, which has no clocks and no memory of its own")
    if options.list:
        for step in steps:
            made = sum(m.seconds for m in suite._needed([*step.needs, *step.extra]))
            print(f"{step.name:<10} {step.seconds:4.0f} s, {made:4.0f} s before: {step.about}")
        return
    suite.run(steps)
    for step in steps:
        if (folder := result_of(plan, step)) is not None:
            print(f"\n{step.name}: {step.about}", *lines(folder), sep="\n")
    for name, why in suite.missed.items():
        print(f"\n{name}: no result: {why}")
    for name, why in suite.absent.items():
        print(f"\n{name}: not made, and no arm of its step: {why}")
    if options.stand_in:
        print("\nCUDA was played by the CPU: no figure here is one of a GPU")
    print(f"\n{sum(suite.seconds.values()):.0f} s of work, {plan.results}")
    if options.archive:
        archived(plan.results, options.archive)
    sys.exit(1 if suite.missed or suite.absent else 0)


def planned(options: argparse.Namespace) -> Plan:
    """SystemExit where CUDA was asked for and does not work."""
    from lora_export.errors import LoraExportError
    from lora_export.runtime import resolve_provider

    try:
        provider = "cuda" if options.stand_in else resolve_provider(options.provider)
    except LoraExportError as error:
        sys.exit(f"{error.found}\n{error.next_step}")
    sizes = options.sizes or ("tiny" if options.stand_in else "real" if provider != "cpu" else "small")
    half = "fp16" if provider != "cpu" else "fp32"
    work = options.work.resolve() / f"{sizes}-{provider}"
    return Plan(work, options.out.resolve(), provider, sizes, half, options.seconds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"suite-{datetime.now():%Y-%m-%d}")
    add("--work", type=Path, default=Path("/tmp/gpu-suite"), help="what is made is kept here and used again")
    add("--provider", default="cuda", help="default: cuda, which must work; cpu; auto")
    add("--sizes", choices=SIZES, help="default: real, small on a CPU, tiny with --stand-in")
    add("--seconds", type=int, default=60, help="of one measurement (default: %(default)s)")
    add("--budget", type=float, metavar="SECONDS", help="for this call; a step that would not fit is left out")
    add("--only", nargs="+", metavar="STEP")
    add("--list", action="store_true", help="print the steps and end")
    add("--archive", type=Path, metavar="FILE", help="keep all results in this .tar.xz as well")
    add("--earlier", type=Path, action="append", default=[], metavar="FILE", help="such an archive, to go on from")
    add("--stand-in", action="store_true", help="the CPU plays CUDA: every path runs, and nothing is measured")
    options = parser.parse_args()
    if options.provider == "cpu" and options.stand_in:
        parser.error("--stand-in plays CUDA; --provider cpu needs no stand-in")
    return options


if __name__ == "__main__":
    main()
