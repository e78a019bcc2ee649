"""How many faults that mutmut puts into the arithmetic the quick tests notice, file by file, as a result.

mutmut run                                # takes long; pyproject.toml says which files and tests
python tools/mutants.py --out benchmarks/results
"""

import argparse
import datetime
import json
from importlib.metadata import version
from pathlib import Path

from generated import ROOT

SURVIVED, NO_TEST = 0, 33  # exit codes that mutmut keeps; None: not run


def counts(folder: Path) -> dict[str, dict[str, int]]:
    """File of the package → how many mutants were noticed, survived, had no test, were not run."""
    found = {}
    for path in sorted((folder / "lora_export").rglob("*.meta")):
        codes = list(json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"].values())
        told = {"survived": SURVIVED, "no_test": NO_TEST, "not_run": None}
        row = {name: sum(c == code for c in codes) for name, code in told.items()}
        if codes:
            name = path.relative_to(folder / "lora_export").with_suffix("").as_posix()
            found[name] = {"noticed": len(codes) - sum(row.values()), **row}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=Path, default=ROOT / "mutants", help="what mutmut left")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    today = datetime.date.today().isoformat()
    result = {"date": today, "mutmut": version("mutmut"), "files": counts(args.mutants)}
    path = args.out / f"mutants-{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
