"""Would `validate --onnx` notice? Seeded faults in the graphs of tiny models of five kinds, and honest exports.

    python tools/graph_faults.py                                  # 60 faults, 60 honest exports
    python tools/graph_faults.py --faults 15 --honest 0 --only encoder

An exporter's fault is in the graph of the merged model and in that of the base; so it is for two thirds of the
faults, and in that of the merged model alone for the rest. A fault that does not run, or changes no answer on valid
inputs beyond what arithmetic in the precision does, is drawn again. Exits 1 if more than two of sixty faults go
unseen or an honest export fails.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import tests.conftest  # noqa: F401  - keeps every library off the network
from lora_export.benchmarking.environment import describe
from lora_export.choices import Precision
from lora_export.contracts import Check
from lora_export.storage.sealed import write_json
from tests.validation.graphs import mutations
from tests.validation.graphs.honest import Case, cases, prompts
from tests.validation.graphs.models import KINDS, MODELS, PRECISIONS, Tiny, Workshop
from tests.validation.graphs.trial import VERDICTS, Bench, Drawn, Verdict

ROOT = Path(__file__).resolve().parents[1]
UNSEEN = 2 / 60  # the share of faults that may go unseen
Row = dict[str, Any]


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    started, workshop = time.monotonic(), Workshop(options.work)
    faults: list[Row] = []
    honest: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lora-export-faults-") as folder:
        for rows, found in (
            (honest, try_honest(options, workshop, Path(folder))),
            (faults, try_faults(options, workshop, Path(folder))),
        ):
            for row in found:
                rows.append(row)
                save(options, faults, honest, time.monotonic() - started)
    print_table(faults, honest)
    summary = summarize(faults, honest)
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    print(f"raw results: {options.out}")
    return 0 if len(summary["unseen"]) <= UNSEEN * len(faults) and not summary["false_alarms"] else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--honest", type=int, default=60)
    known = [*KINDS, *PRECISIONS, *mutations.KINDS, *(tiny.cls for tiny in MODELS)]
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=known,
        metavar="KIND",
        help=f"several of a sort are alternatives: {', '.join(known)}",
    )
    work = Path(tempfile.gettempdir()) / "lora-export-graph-faults"
    parser.add_argument("--work", type=Path, default=work, help="models and exports, kept for the next run")
    name = f"graph-faults-{datetime.now():%Y-%m-%d-%H%M%S}.json"
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / name)
    return parser.parse_args()


def wanted(options: argparse.Namespace) -> tuple[list[list[Tiny]], list[Precision], list[str]]:
    """Models by kind, precisions, and kinds of fault that `--only` leaves."""

    def kept(names: Sequence[str]) -> list[str]:
        return [n for n in names if n in options.only] or list(names)

    models = [t for t in MODELS if t.kind in kept(KINDS) and t.cls in kept([t.cls for t in MODELS])]
    by_kind = [[t for t in models if t.kind == kind] for kind in KINDS]
    precisions = [p for p in PRECISIONS if p in kept(PRECISIONS)]
    return [group for group in by_kind if group], precisions, kept(list(mutations.KINDS))


# --- faults ------------------------------------------------------------------------------------------------


def try_faults(options: argparse.Namespace, workshop: Workshop, work: Path) -> Iterator[Row]:
    """Kinds of model and precisions in turn; of the kinds of fault, the one that came least often so far."""
    groups, precisions, names = wanted(options)
    rng, used = random.Random(options.seed), dict.fromkeys(names, 0)
    alone = set(rng.sample(range(options.faults), options.faults // 3))
    benches: dict[tuple[str, Precision], Bench] = {}
    for number in range(options.faults):
        group, turn = groups[number % len(groups)], number // len(groups)
        precision = precisions[turn % len(precisions)]
        tiny = group[turn // len(precisions) % len(group)]
        key = tiny.cls, precision
        bench = benches.setdefault(key, Bench(workshop, tiny, precision, work / "-".join(key)))
        started = time.monotonic()
        drawn = draw(bench, rng, used)
        if drawn is None:
            print(f"no fault of these kinds in {tiny.cls} {precision}")
            continue
        row = try_fault(bench, drawn, number not in alone)
        yield {"number": number, **row, "seconds": round(time.monotonic() - started, 1)}


def draw(bench: Bench, rng: random.Random, used: dict[str, int]) -> Drawn | None:
    for kind in sorted(used, key=lambda name: (used[name], rng.random())):
        drawn = bench.draw(kind, rng)
        if drawn is not None:
            used[kind] += 1
            return drawn
    return None


def try_fault(bench: Bench, drawn: Drawn, shared: bool) -> Row:
    verdict = bench.judge(drawn.merged, drawn.base if shared else bench.base)
    caught = bench.caught(verdict)
    row = {
        "kind": bench.tiny.kind,
        "model": bench.tiny.cls,
        "precision": bench.precision,
        "fault": drawn.fault.kind,
        "what": drawn.fault.words,
        "graph": drawn.fault.graph,
        "in_the_base_too": shared,
        "effect": drawn.effect,
        "noise": drawn.noise,
        "draws": drawn.draws,
        "caught": bool(caught),
        "caught_by": caught,
        "refused": verdict.refused,
        "checks": onnx_checks(verdict),
    }
    by = ", ".join(caught[:4]) + (" …" if len(caught) > 4 else "") or "NOT CAUGHT"
    where = f"{bench.tiny.cls} {bench.precision}, {'both' if shared else 'merged'}"
    moved = f"moves {drawn.effect:.2g}, noise {drawn.noise:.2g}"
    print(f"{drawn.fault.kind}: {drawn.fault.words} ({where}; {moved}): {by}", flush=True)
    return row


def onnx_checks(verdict: Verdict) -> list[Row]:
    return [short(c) for c in verdict.checks if c.name.startswith("onnx")]


def short(check: Check) -> Row:
    return {k: v for k, v in asdict(check).items() if k != "note"}


# --- honest exports ----------------------------------------------------------------------------------------


def try_honest(options: argparse.Namespace, workshop: Workshop, work: Path) -> Iterator[Row]:
    groups, precisions, _ = wanted(options)
    for number, case in enumerate(cases(groups, precisions, options.honest, options.seed)):
        yield {"number": number, **try_export(workshop, case, work)}


def try_export(workshop: Workshop, case: Case, work: Path) -> Row:
    started = time.monotonic()
    bench = Bench(workshop, case.tiny, case.precision, work)
    adapted = workshop.adapted(case.tiny, case.seed, case.ratio)
    onnx = workshop.reweighted(case.tiny, case.precision, adapted)
    verdict = bench.judge(onnx, bench.base, adapted, prompts(case, work))
    row = {
        "kind": case.tiny.kind,
        "model": case.tiny.cls,
        "precision": case.precision,
        "seed": case.seed,
        "update": case.ratio,
        "own_prompts": case.own_prompts,
        "false_alarm": bool(verdict.names - {*VERDICTS}),
        "keeps_too_little": bool(verdict.names) and verdict.names <= {*VERDICTS},
        "failed": [short(c) for c in verdict.failed],
        "refused": verdict.refused,
        "checks": onnx_checks(verdict),
        "seconds": round(time.monotonic() - started, 1),
    }
    said = "; ".join(f"{c.name} {c.value:.3g}, allowed {c.threshold:.3g}" for c in verdict.failed if c.threshold)
    print(f"honest: {case.words}: {said or verdict.refused or 'passed'}", flush=True)
    return row


# --- what came out -----------------------------------------------------------------------------------------


def save(options: argparse.Namespace, faults: Sequence[Row], honest: Sequence[Row], seconds: float) -> None:
    """After each row, so that a run that is broken off has left what it found."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": summarize(faults, honest),
        "seed": options.seed,
        "only": options.only,
        "seconds": round(seconds, 1),
        "machine": describe(),
        "faults": list(faults),
        "honest": list(honest),
    }
    write_json(options.out, record)


def summarize(faults: Sequence[Row], honest: Sequence[Row]) -> Row:
    return {
        "faults": len(faults),
        "in_the_base_too": sum(r["in_the_base_too"] for r in faults),
        "caught": sum(r["caught"] for r in faults),
        "unseen": [f"{r['model']} {r['precision']}: {r['fault']}: {r['what']}" for r in faults if not r["caught"]],
        "honest": len(honest),
        "tiny_or_large_updates": sum(r["update"] < 0.001 or r["update"] >= 1 for r in honest),
        "false_alarms": [
            f"{r['model']} {r['precision']} seed {r['seed']} update {r['update']:g}: "
            f"{', '.join(c['name'] for c in r['failed']) or r['refused']}"
            for r in honest
            if r["false_alarm"]
        ],
        # Weights and arithmetic are proven right there, so it is the precision that loses the adapter.
        "the_precision_keeps_too_little": [
            f"{r['model']} {r['precision']} seed {r['seed']} update {r['update']:g}: {c['value']:.3g}"
            for r in honest
            if r["keeps_too_little"]
            for c in r["failed"]
        ],
    }


def print_table(faults: Sequence[Row], honest: Sequence[Row]) -> None:
    print(f"\n{'kind':<16} {'precision':<9} {'faults':>6} {'caught':>6} {'honest':>6} {'false alarms':>12}")
    for kind in KINDS:
        for precision in PRECISIONS:
            own, fair = (
                [r for r in rows if (r["kind"], r["precision"]) == (kind, precision)] for rows in (faults, honest)
            )
            counts = len(own), sum(r["caught"] for r in own), len(fair), sum(r["false_alarm"] for r in fair)
            print("{:<16} {:<9} {:>6} {:>6} {:>6} {:>12}".format(kind, precision, *counts))


if __name__ == "__main__":
    sys.exit(main())
