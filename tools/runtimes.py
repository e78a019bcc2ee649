"""What each runtime makes of each package, as a result: the tables of docs/how-to/runtimes.md.

    python tools/runtimes.py                       # every test that has an answer to keep; about an hour
    python tools/runtimes.py -k vllm               # of one runtime; the other cells stay as they were
    python tools/runtimes.py --gather FOLDER …     # of tests that have run, with LORA_EXPORT_ANSWERS=FOLDER

The tests say what they compared (tests/consumers/answers.py), one cell of the table each. The result has the cells
of the newest earlier result as well, unless the tests made them again, or --anew leaves them out; each cell has its
date. If a cell or a test fails, no result is written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from processes import HERE, RESULTS, circumstances

sys.path.insert(0, str(HERE.parent))
from tests.consumers.answers import MODELS, Cell

TESTS = HERE.parent / "tests"
_KEEPS = "tests.consumers.answers"  # what a test elsewhere imports that has cells


@dataclass(frozen=True)
class Key:
    """Of a cell. A runtime has one cell for a package of a model, of whatever version it is."""

    consumer: str
    package: str
    model: str
    name: str

    def __str__(self) -> str:
        return f"{self.consumer}: {self.package}, {self.model} ({self.name})"


def key(cell: Cell) -> Key:
    return Key(*(getattr(cell, f.name) for f in fields(Key)))


def gathered(folders: Iterable[Path]) -> dict[Key, Cell]:
    """The cells that tests left in folders; of two, that of the later date, then that of the later folder."""
    found: dict[Key, Cell] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*.json"))):
        cell = Cell(**json.loads(path.read_text(encoding="utf-8")))
        earlier = found.get(key(cell))
        if earlier is None or earlier.date <= cell.date:
            found[key(cell)] = cell
    return found


def wrong(cells: Mapping[Key, Cell]) -> list[str]:
    """What keeps these cells out of a result, in words."""
    found = [f"{k}: {c.said or 'failed'}" for k, c in cells.items() if c.result == "failed"]
    found += [f"{k}: no such kind of model" for k in cells if k.model not in MODELS]
    silent = {"ok": "compared", "refused": "said"}
    empty = [(k, c) for k, c in cells.items() if not getattr(c, silent.get(c.result, "said"))]
    return found + [f"{k}: {c.result}, without words" for k, c in empty]


def merged(earlier: Mapping[str, Any], cells: Mapping[Key, Cell], around: Mapping[str, Any]) -> dict[str, Any]:
    """A result of `cells`, and of the earlier result's others. around: machine and versions of today.

    `machines` has machine and versions by the dates of the cells.
    """
    kept = {key(c): c for c in (Cell(**cell) for cell in earlier.get("cells", ()))}
    every = sorted((kept | cells).values(), key=lambda c: (c.consumer.lower(), MODELS.index(c.model), str(key(c))))
    known = {**earlier.get("machines", {}), **{c.date: around for c in cells.values()}}
    dates = sorted({c.date for c in every})
    return {"machines": {d: known[d] for d in dates}, "cells": [asdict(c) for c in every]}


def newest(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob("runtimes-*.json"))
    return dict(json.loads(found[-1].read_text(encoding="utf-8"))) if found else {}


def run(words: Sequence[str], answers: Path) -> int:
    """pytest's exit code."""
    runtimes = TESTS / "consumers"
    others = (p for p in sorted(TESTS.rglob("test_*.py")) if not p.is_relative_to(runtimes))
    files = [p for p in others if _KEEPS in p.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "--timeout", "3600", *words, runtimes, *files]
    where = os.environ | {"LORA_EXPORT_ANSWERS": str(answers)}
    return subprocess.run(command, cwd=HERE.parent, env=where, check=False).returncode


def main() -> int:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="runtimes-") as scratch:
        code = 0 if options.gather else run(["-k", options.k] if options.k else [], Path(scratch))
        cells = gathered(options.gather or [Path(scratch)])
        around = {k: v for k, v in circumstances(HERE, HERE).items() if k in ("machine", "versions")}
    faults = wrong(cells) + ([] if cells else ["no cell"]) + ([f"pytest ended with {code}"] if code else [])
    if faults:
        print("no result was written:", *faults, sep="\n  ", file=sys.stderr)
        return 1
    earlier = {} if options.anew else newest(options.out)
    result = merged(earlier, cells, around)
    path = options.out / f"runtimes-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    old = [c for c in (Cell(**cell) for cell in result["cells"]) if key(c) not in cells]
    for cell in old:
        print(f"not run again since {cell.date}: {key(cell)}")
    print(f"{len(cells)} cells, and {len(old)} of an earlier result: {path}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", help="which tests, as pytest understands it")
    parser.add_argument("--gather", type=Path, nargs="+", metavar="FOLDER", help="of cells: run no test")
    parser.add_argument("--anew", action="store_true", help="without the cells of an earlier result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
