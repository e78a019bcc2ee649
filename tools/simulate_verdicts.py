"""How often the benchmark is wrong: simulated studies of a known ratio, under noise of several kinds.

    python tools/simulate_verdicts.py --studies 400
    python tools/simulate_verdicts.py --studies 400 --checks    # of identical graphs: how many are doubted

Each study warms up, plans, measures and judges as `lora-export benchmark` does, on a clock that only the simulation
moves. Prints the share of each verdict with its 95 % interval (Clopper and Pearson), and keeps the counts.
"""

import argparse
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from processes import HERE, save
from scipy.stats import binomtest

sys.path.insert(0, str(HERE.parent))

from tests.benchmarking.machine import MARGIN, NOISES, suspected, verdict

CHECKED = (1.0, 1.02, 1.05, 1.1, 1.2)
RATIOS = (1.0, 1.005, 1.01, 1.02, 1.03)
VERDICTS = ("equivalent", "slower", "inconclusive")


def main() -> None:
    options = parse()
    if options.checks:
        checks(options)
        return
    rows = []
    with ProcessPoolExecutor() as pool:
        for name, noise in NOISES.items():
            for ratio in RATIOS:
                found = Counter(pool.map(partial(verdict, ratio, noise), range(options.studies), chunksize=8))
                rows.append({"noise": name, "ratio": ratio, "studies": options.studies, **found})
                print(
                    f"{name:<15} {ratio:.3f}  " + "  ".join(shown(found[v], options.studies, v) for v in VERDICTS)
                )
    save(options.results, "verdicts", {"margin": MARGIN, "studies": rows})


def checks(options: argparse.Namespace) -> None:
    rows = []
    with ProcessPoolExecutor() as pool:
        for name, noise in NOISES.items():
            for ratio in CHECKED:
                again = sum(pool.map(partial(suspected, ratio, noise), range(options.studies), chunksize=8))
                rows.append({"noise": name, "ratio": ratio, "studies": options.studies, "again": again})
                print(f"{name:<15} {ratio:.3f}  {shown(again, options.studies, 'measured again')}")
    save(options.results, "checks", {"margin": MARGIN, "studies": rows})


def shown(count: int, of: int, verdict: str) -> str:
    interval = binomtest(count, of).proportion_ci(0.95)
    return f"{verdict} {count / of:6.1%} ({interval.low:.1%}–{interval.high:.1%})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=400, help="for each ratio and kind of noise")
    parser.add_argument("--checks", action="store_true", help="check identical graphs, instead of a full study")
    parser.add_argument(
        "--results", type=Path, help="file for the counts, in place of a new one in benchmarks/results"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
