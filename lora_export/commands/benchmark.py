"""lora-export benchmark: the latency of ONNX graphs, side by side in one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.commands import derive
from lora_export.commands.derive import FOLDER, Given
from lora_export.commands.talk import Talk, table
from lora_export.contracts.options import BenchmarkOptions


@derive.command(
    "benchmark",
    Given("-b", "--base", type=FOLDER, help="The base's ONNX folder or file."),
    Given("-m", "--merged", type=FOLDER, required=True, help="The merged ONNX folder or file."),
    Given("-u", "--unmerged", type=FOLDER,
          help="The unmerged one, which `export --unmerged` writes: the positive control."),
    Given("--plugged", type=FOLDER, metavar="ONNX",
          help="A folder that `export -a` wrote, or its .onnx_adapter file: plugged in at run time."),
    Given("--pytorch", nargs=2, metavar="BASE ADAPTER", help="Also PEFT's unmerged model under PyTorch."),
    Given("--beside", multiple=True, metavar="NAME=ONNX",
          help="Another graph of the same model, such as optimum=FOLDER. May be given more than once."),
    derive.OUTPUT,
    derive.options_of(BenchmarkOptions),
    derive.FORCE,
)  # fmt: skip
def benchmark(
    talk: Talk, base: Path | None, merged: Path, unmerged: Path | None, plugged: Path | None,
    pytorch: tuple[str, str] | None, beside: tuple[str, ...], output: Path, force: bool, **given: Any,
) -> None:  # fmt: skip
    """Measure base, merged and unmerged graphs in turn, and say whether merging costs latency.

    Where base and merged are one optimized graph, the verdict is equivalent by structure unless merged is measured
    slower, in other sessions again. Otherwise it is equivalent, slower or inconclusive: the 90 % interval of
    merged/base lies within the margin, above it, or the machine was too noisy to tell. Something that does more
    work must then be found slower in the same blocks: -u, else --plugged, else the base itself held up by two
    margins. OUT gets a
    report and every raw sample; if merged is slower, the exit code is 3 and they are in OUT.failed. Asking for cuda
    where it does not work is an error, never a silent fallback.

    \b
        lora-export export -m BASE -a ADAPTER --unmerged -o unmerged-onnx
        lora-export benchmark -b base-onnx -m merged-onnx -u unmerged-onnx --grid standard -o latency
    """
    from lora_export import api
    from lora_export.commands.words import benchmark_rows

    derive.check_benchmark()
    result = api.benchmark(
        merged,
        output,
        base=base,
        unmerged=unmerged,
        plugged=plugged,
        pytorch=pytorch,
        beside=derive.pairs("--beside", beside),
        options=replace(derive.build(BenchmarkOptions, given), configured=talk.configured),
        force=force,
        progress=talk.progress,
    )
    talk.result(result, table([*benchmark_rows(result), ("report", str(output / "report.html"))]))
