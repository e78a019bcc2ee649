"""lora-export export: a Hugging Face folder to ONNX."""

from pathlib import Path
from typing import Any

from lora_export.commands import derive
from lora_export.commands.derive import Given
from lora_export.commands.talk import Talk, megabytes, table
from lora_export.commands.words import calibration_rows
from lora_export.contracts import ExportResult
from lora_export.contracts.options import ExportOptions
from lora_export.wording import proof_in_words


@derive.command(
    "export",
    Given("-m", "--model", required=True, metavar="MODEL", help="A merged folder, or any model."),
    Given("-a", "--adapter", "adapters", multiple=True, metavar="ADAPTER",
          help="Keep this LoRA out of the weights: MODEL is exported with slots, and ADAPTER.onnx_adapter is "
          "written, which onnxruntime (LoraAdapter) and onnxruntime-genai (Adapters) plug in at run time. May be "
          "given more than once."),
    derive.OUTPUT,
    derive.options_of(ExportOptions),
    derive.DRY_RUN,
)  # fmt: skip
def export(talk: Talk, model: str, adapters: tuple[str, ...], output: Path, dry_run: bool, **given: Any) -> None:
    """Export a model folder to ONNX: decoders for onnxruntime-genai, all others with Optimum's names.

    The graph does not depend on an adapter. With --graph-from, an earlier export of the same base provides the
    graph, byte for byte, and only the weights are written anew: at the speed of a copy, without loading the model.
    With --shared-as as well, OUT is a folder that many adapters share: base.bin, and for each adapter a graph and
    the weights that it changed.

    \b
        lora-export export -m ./base -o ./base-onnx
        lora-export export -m ./merged-a -o ./a-onnx --graph-from ./base-onnx
        lora-export export -m ./merged-b -o ./all --graph-from ./base-onnx --shared-as b    # all/b.onnx
        lora-export export -m ./base -a ./a -a ./b -o ./plug        # one graph, a.onnx_adapter, b.onnx_adapter
        lora-export export -m ./base -a ./a --unmerged -o ./slow    # to measure what merging saves
    """
    from lora_export import api
    from lora_export.workflows.exporting import check_export, planned_export

    options = derive.build(ExportOptions, given)
    check_export(len(adapters), options)
    options = derive.as_the_earlier(options)
    if dry_run:
        document = planned_export(model, options)
        rows = [*((k, str(v)) for k, v in document.items()), ("dry run", "nothing was written")]
        talk.result({"output": str(output), "dry_run": True} | document, table(rows))
        return
    result = api.export(model, output, adapters=adapters, options=options, progress=talk.progress)
    rows = [
        ("engine", result.engine),
        ("precision", result.precision),
        ("nodes", str(result.nodes)),
        *proof_rows(result),
        *calibration_rows(result),
        ("time", f"{result.seconds:.1f} s"),
        *((name, megabytes(size)) for name, size in result.files.items()),
        ("output", str(output)),
    ]
    talk.result(result, table(rows))


def proof_rows(result: ExportResult) -> list[tuple[str, str]]:
    """The proof in a line, and what it says of limits."""
    if result.proof is None:
        return []
    return [("proof", proof_in_words(result.proof)), *(("limit", limit) for limit in result.proof.limits)]
