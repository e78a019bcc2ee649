"""Would the gates notice? Seeded faults in the merged weights of a real model, and honest merges beside them.

    python tools/sensitivity.py --base BASE           # 60 faults, 30 honest merges: half an hour on two cores
    python tools/sensitivity.py --base BASE --faults 15 --honest 0 --cli 0

Faults are put into the weights in memory, where models and noise floors are loaded and measured once an adapter;
the tensors that a fault did not touch were compared in the honest merge. `--cli` of them are written as files as
well and judged by the command line. Exits 1 if a fault goes unseen or an honest merge fails.
"""

import argparse
import json
import os
import subprocess
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tests.conftest  # noqa: F401  - keeps every library off the network
from lora_export.benchmarking.environment import describe
from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.errors import EXIT_GATE
from lora_export.merging import merge
from lora_export.storage.sealed import write_json
from lora_export.validation.comparing.texts import PROMPTS as BUILT_IN
from lora_export.validation.reference import loading
from lora_export.validation.reference.loading import load_as_stored, own_type
from tests.validation.faults import FAULTS, Bench, Fault, unmerged_model

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = (BUILT_IN[4], BUILT_IN[0], BUILT_IN[3])  # short ones of three registers: 26, 5 and 42 tokens of SmolLM2
DTYPES: tuple[Any, ...] = ("float32", "bfloat16", "float16")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
Row = dict[str, Any]


def main() -> int:
    options = arguments()
    adapters = options.adapter or sorted((ROOT / "examples" / "adapters").iterdir())
    started = time.monotonic()
    faults: list[Row] = []
    honest: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lora-export-sensitivity-") as folder:
        for rows, found in (
            (faults, try_faults(options, adapters, Path(folder))),
            (honest, try_honest(options, adapters, Path(folder))),
        ):
            for row in found:
                rows.append(row)
                save(options, adapters, faults, honest, time.monotonic() - started)
    summary = summarize(faults, honest)
    print(json.dumps(summary, indent=1))
    print(f"raw results: {options.save}")
    return 0 if not summary["unseen"] and not summary["false_alarms"] else 1


def save(
    options: argparse.Namespace,
    adapters: Sequence[Path],
    faults: Sequence[Row],
    honest: Sequence[Row],
    seconds: float,
) -> None:
    """After each row, so that a run that is broken off has left what it found."""
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "summary": summarize(faults, honest),
        "model": options.base.name,
        "adapters": [a.name for a in adapters],
        "prompts": options.prompts,
        "rows": options.rows,
        "seconds": round(seconds, 1),
        "machine": describe(),
        "faults": list(faults),
        "honest": list(honest),
    }
    write_json(options.save, record)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a Llama folder")
    parser.add_argument("--adapter", type=Path, action="append", help="default: those of examples/adapters")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--honest", type=int, default=30, help="honest merges, over types and adapters")
    parser.add_argument("--cli", type=int, default=3, help="faults that the command line judges, too")
    parser.add_argument("--prompts", type=int, default=2, help="how many of the short ones")
    parser.add_argument("--rows", type=int, default=64)
    name = f"sensitivity-{datetime.now():%Y-%m-%d-%H%M%S}.json"
    parser.add_argument("--save", type=Path, default=ROOT / "benchmarks" / "results" / name)
    options = parser.parse_args()
    options.prompts = PROMPTS[: options.prompts]
    return options


# --- faults ------------------------------------------------------------------------------------------------


def try_faults(options: argparse.Namespace, adapters: Sequence[Path], work: Path) -> Iterator[Row]:
    """One row a fault: the kinds in turn, with a seed of their own each, shared out among the adapters."""
    for index, adapter in enumerate(adapters):
        numbers = range(index, options.faults, len(adapters))
        if not numbers:
            return
        merged = work / f"merged-{index}"
        merge(options.base, [AdapterChoice(adapter)], merged, MergeOptions(dtype="bfloat16"))
        bench = Bench.load(unmerged_model(options.base, adapter), merged, options.prompts, options.rows)
        assert not bench.judge().failed, "the honest merge does not pass"
        for number in numbers:
            fault = FAULTS[(number // len(adapters) + index) % len(FAULTS)]
            yield try_fault(options, bench, adapter, merged, number, fault)


def try_fault(
    options: argparse.Namespace, bench: Bench, adapter: Path, merged: Path, number: int, fault: Fault
) -> Row:
    seed = 1000 + number
    started = time.monotonic()
    touched, found = bench.try_fault(fault, seed)
    module = found.by_outputs.module if found.by_outputs else None
    row = {
        "fault": fault.__name__,
        "seed": seed,
        "adapter": adapter.name,
        "changed": list(touched),
        "caught": bool(found.failed),
        "failed_checks": list(found.failed),
        "caught_by_outputs": found.by_model_outputs,
        "suspect": found.suspect(),
        "named": found.suspect() in touched,
        "module_by_outputs": module,
        "module_named_by_outputs": module in {name.rpartition(".")[0] for name in touched},
        "deviation": asdict(found.located) if found.located else None,
        "seconds": round(time.monotonic() - started, 1),
    }
    if number < options.cli:
        row["command_line"] = by_command_line(options, adapter, merged, fault(bench.material(seed)))
    print_row(row)
    return row


def by_command_line(options: argparse.Namespace, adapter: Path, merged: Path, changed: dict[str, Any]) -> Row:
    """Exit code and verdict of `lora-export validate` on the same fault in a file, which is then made whole."""
    file = merged / "model.safetensors"
    honest = load_file(file)
    spoiled = {n: changed[n].to(t.dtype).contiguous() if n in changed else t for n, t in honest.items()}
    prompts = merged.parent / "prompts.txt"
    prompts.write_text("\n".join(" ".join(p.split()) for p in options.prompts), encoding="utf-8")
    code = "from lora_export.commands.main import cli; cli()"
    command = [
        sys.executable,
        "-c",
        code,
        "validate",
        "-b",
        options.base,
        "-a",
        adapter,
        "-m",
        merged,
        "--dtype",
        "bfloat16",
    ]
    command += ["--prompts", prompts, "--text", prompts, "--rows", str(options.rows), "--json", "-q"]
    try:
        save_file(spoiled, file, metadata={"format": "pt"})
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    finally:
        save_file(honest, file, metadata={"format": "pt"})
    said = json.loads(done.stdout) if done.stdout else {}
    named = ((said.get("deviation") or {}).get("tensors") or said.get("weight_errors") or [None])[0]
    return {"exit_code": done.returncode, "as_expected": done.returncode == EXIT_GATE, "suspect": named}


# --- honest merges -----------------------------------------------------------------------------------------


def try_honest(options: argparse.Namespace, adapters: Sequence[Path], work: Path) -> Iterator[Row]:
    """One row a merge that must pass, as stored and as loaded; after the given adapters, random ones."""
    for index in range(-(-options.honest // len(DTYPES))):
        adapter = adapters[index] if index < len(adapters) else random_adapter(options.base, work, index)
        unmerged = unmerged_model(options.base, adapter)
        for dtype in DTYPES[: options.honest - index * len(DTYPES)]:
            merged = work / "honest"
            merge(options.base, [AdapterChoice(adapter)], merged, MergeOptions(dtype=dtype, force=True))
            bench = Bench.load(unmerged, merged, options.prompts, options.rows)
            yield try_merge(bench, adapter, dtype, merged)


def try_merge(bench: Bench, adapter: Path, dtype: Any, merged: Path) -> Row:
    started = time.monotonic()
    failed = list(bench.judge().failed)
    narrow = own_type(bench.dtypes)
    if narrow:
        checks, _ = bench.comparison.compare_loaded(bench.unmerged, load_as_stored(merged), narrow)
        failed += [c.name for c in checks if not c.passed]
    row = {
        "adapter": adapter.name,
        "dtype": dtype,
        "false_alarm": bool(failed),
        "failed_checks": failed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(f"honest  {adapter.name:<16} {dtype:<9} {', '.join(failed) or 'passed'}  {row['seconds']} s", flush=True)
    return row


def random_adapter(base: Path, work: Path, seed: int) -> Path:
    """Matrices as training leaves them in size (an update of about a percent), on some kinds of some layers."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(TARGETS), generator=generator)[: 2 + seed % 2].tolist()
    model = loading.load_base(base, MergeOptions())
    config = LoraConfig(
        r=4 * (1 + seed % 3),
        lora_alpha=10,
        target_modules=[TARGETS[i] for i in chosen],
        layers_to_transform=torch.randperm(model.config.num_hidden_layers, generator=generator)[:8].tolist(),
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    folder = work / f"random-{seed}"
    tuned.save_pretrained(folder)
    return folder


# --- what came out -----------------------------------------------------------------------------------------


def summarize(faults: Sequence[Row], honest: Sequence[Row]) -> Row:
    return {
        "faults": len(faults),
        "caught": sum(r["caught"] for r in faults),
        "named": sum(r["named"] for r in faults),
        "caught_by_outputs": sum(r["caught_by_outputs"] for r in faults),
        "module_named_by_outputs": sum(r["module_named_by_outputs"] for r in faults),
        "command_line_as_expected": sum(r["command_line"]["as_expected"] for r in faults if "command_line" in r),
        "command_line_runs": sum("command_line" in r for r in faults),
        "unseen": [f"{r['fault']} {r['seed']}" for r in faults if not r["caught"]],
        "misnamed": [f"{r['fault']} {r['seed']}" for r in faults if not r["named"]],
        "honest": len(honest),
        "false_alarms": [f"{r['adapter']} {r['dtype']}" for r in honest if r["false_alarm"]],
    }


def print_row(row: Row) -> None:
    caught = "tensors and outputs" if row["caught_by_outputs"] else ("tensors" if row["caught"] else "NOT CAUGHT")
    named = row["suspect"] if row["named"] else f"WRONG: {row['suspect']}"
    line = f"{row['fault']:<26} {row['seed']}  {caught:<20} {named}"
    if "command_line" in row:
        line += f"  exit code {row['command_line']['exit_code']}"
    print(line, f"  {row['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
