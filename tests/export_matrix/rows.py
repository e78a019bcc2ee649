"""The architectures that people fine-tune: each is exported tiny, with random weights, and compared with PyTorch.

`python -m tests.export_matrix.rows NAME …` tries rows by hand and prints a line for each.
"""

import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.contracts import ExportOptions, ExportResult
from lora_export.onnx_export import export
from lora_export.progress import Silent
from lora_export.workflows.proving import prover
from tests.export_matrix import audio, decoders, encoders, more, multimodal, seq2seq, vision
from tests.export_matrix.models import Row

ROWS: Mapping[str, Row] = {
    row.name: row
    for group in (encoders, decoders, seq2seq, vision, audio, multimodal, more)
    for row in group.ROWS
}  # fmt: skip


def exported(row: Row, folder: Path, seed: int = 7) -> tuple[Any, ExportResult]:
    """The model, and its export, which has passed the proof."""
    model = row.save(folder / "model", seed)
    options = ExportOptions("fp32", "cpu")
    return model, export(folder / "model", folder / "onnx", options, prove=prover(options.proof), progress=Silent())


def difference(row: Row, folder: Path) -> tuple[str, float]:
    """The engine, and the largest difference from PyTorch, relative to the largest value of an output, over shapes
    that were not traced. The comparison is not that of the proof."""
    model, result = exported(row, folder)
    return result.engine, row.compare(result, model)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    for name in sys.argv[1:] or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                engine, worst = difference(ROWS[name], Path(folder))
                say(f"{name:45} {engine:8} {worst:.1e}")
            except Exception as error:
                if len(sys.argv) == 2:
                    traceback.print_exc()
                say(f"{name:45} {' '.join(str(error).split())[:300]}")


if __name__ == "__main__":
    main()
