"""What it costs to plan a fleet of many tiny adapters, and to run a finished one again.

    python tools/bench_fleet_plan.py --rows 10000 --finished 1000

`lora-export fleet JOBS --dry-run` as a whole process, from TOML, CSV and JSONL: with no cache of hashes (every file
is read), and with it. Then a finished fleet: made-up objects of a few small files lie under the keys of the first
rows, and the command runs once to write its report, and again, which must write nothing.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bench_memory import peak_of
from processes import LORA_EXPORT, circumstances, save
from safetensors.numpy import save_file

MODULE = "model.layers.0.self_attn.q_proj"
FORMS = ("csv", "jsonl", "toml")


def made(work: Path, rows: int) -> None:
    """A base with one matrix, `rows` LoRAs of it that differ in a number, and jobs files of all of them."""
    draw = np.random.default_rng(5)
    base = work / "base"
    base.mkdir(parents=True)
    save_file({f"{MODULE}.weight": draw.normal(size=(48, 48)).astype("f4")}, base / "model.safetensors")
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(settings))
    a, b = draw.normal(size=(4, 48)).astype("f4"), draw.normal(size=(48, 4)).astype("f4")
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 10, "target_modules": ["q_proj"]})
    for number in range(rows):
        folder = work / "adapters" / f"a{number:06}"
        folder.mkdir(parents=True)
        a[0, 0] = number
        named = {f"base_model.model.{MODULE}.lora_{k}.weight": v for k, v in (("A", a), ("B", b))}
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(config)
    jobs(work, "all", rows)


def jobs(work: Path, name: str, rows: int) -> None:
    """The jobs files NAME.csv, .jsonl and .toml of the first rows."""
    names = [f"a{number:06}" for number in range(rows)]
    lines = [f"{n},base,adapters/{n}" for n in names]
    (work / f"{name}.csv").write_text("\n".join(["name,model,adapter", *lines]) + "\n")
    each = [{"name": n, "model": "base", "adapter": f"adapters/{n}"} for n in names]
    (work / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in each))
    (work / f"{name}.toml").write_text('[base.tiny]\nmodel = "base"\n[[adapters]]\nglob = "adapters/*"\n')


def finished(work: Path, root: Path) -> None:
    """Objects of a dozen small files under the keys of the first rows, as a fleet would have left them."""
    from lora_export.api import plan_fleet
    from lora_export.contracts.fleet import Record, RowFigures, RowOutcome
    from lora_export.fleet.stores import opened

    store = opened(str(root))
    figures = RowFigures(survival=0.99, delta_survival=1.0, kl=1e-4, ratio=1.0, nbytes=10**6, checks=30)
    for planned in plan_fleet(work / "some.csv", root):
        assert planned.state is None, planned.error
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            folder = Path(scratch, "object")
            folder.mkdir()
            for number in range(12):
                (folder / f"file{number}").write_text(planned.key)
            outcome = RowOutcome(planned.row.name, planned.key, "done", seconds=3.0, figures=figures)
            store.publish(folder, f"objects/{planned.key}", Record(1, planned.key, {}, outcome, {}))


def written(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def main() -> None:
    options = parse()
    work = options.work / f"fleet-{options.rows}"
    shutil.rmtree(work, ignore_errors=True)
    made(work, options.rows)
    jobs(work, "some", options.finished)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    os.sync()
    found: dict[str, Any] = {}
    for form in FORMS:
        for state in ("cold", "warm"):
            if state == "cold":
                shutil.rmtree(work / "cache", ignore_errors=True)
            words = [LORA_EXPORT, "fleet", work / f"all.{form}", "-o", work / "none", "--dry-run", "-q"]
            found[f"{form}, {state}"] = peak_of(words)
    root = work / "root"
    finished(work, root)
    again = [LORA_EXPORT, "fleet", work / "some.csv", "-o", root, "-q"]
    found["finished, first report"] = peak_of(again)
    before = written(root)
    found["finished, again"] = peak_of(again)
    same = written(root) == before
    for name, one in found.items():
        print(f"{name}: {one['seconds']:.2f} s, {one['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    print("a finished fleet wrote nothing" if same else "A FINISHED FLEET WROTE SOMETHING")
    sizes = {"rows": options.rows, "finished": options.finished, "finished_wrote_nothing": same}
    save(options.save, "fleet-plan", circumstances(work, work) | sizes | {"commands": found})
    shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--finished", type=int, default=1_000)
    work = Path(tempfile.gettempdir(), "lora-export-bench")
    parser.add_argument(
        "--work", type=Path, default=work, help="folder for adapters and root (default: %(default)s)"
    )
    parser.add_argument("--save", type=Path, help="JSON file to write (default: a new one in benchmarks/results)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
