"""What lower precision and other bases do to an adapter, on a real model and held-out text.

    python tools/bench_quality.py --passages 5

Merges the two adapters of `examples/adapters` into SmolLM2, exports the first in fp16, int8 and int4, and
validates: what each precision keeps of the adapter's effect, and what the QLoRA adapter does on the dequantized
base, the original one, and after its merge is put back into NF4. Needs no network once
`examples/prepare_smollm2.py` has
run. Takes about a quarter of an hour on two cores.
"""

import argparse
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from processes import HERE, RESULTS

from lora_export import export, merge, validate
from lora_export.contracts import CompareBases, ExportOptions, MergeOptions, ValidationOptions
from lora_export.manifest import versions
from lora_export.progress import Console
from lora_export.storage.documents import as_json
from lora_export.storage.sealed import write_json

sys.path.insert(0, str(HERE.parent / "examples"))
import prepare_smollm2

ADAPTERS = HERE.parent / "examples" / "adapters"
PRECISIONS = ("fp16", "int8", "int4")
LENGTH = 1500  # characters of a passage


def held_out(passages: int) -> str:
    """The beginnings of messages on which the adapters were not trained: every tenth was held out."""
    files = sorted(prepare_smollm2.speeches().glob("*.txt"))[9::10]
    return "\n\n".join(f.read_text(encoding="utf-8")[:LENGTH] for f in files[:passages])


def precisions(base: Path, text: Path, work: Path, progress: Console) -> dict[str, Any]:
    adapter, merged = ADAPTERS / "lora-speeches", work / "merged"
    merge(base, adapter, merged, progress=progress)
    exports = []
    for precision in PRECISIONS:
        options = ExportOptions(precision=precision, provider="cpu")
        exports.append(export(merged, work / precision, options=options, progress=progress))
    options = ValidationOptions(text=text, provider="cpu", min_survival=0.0, prompts=prompts(work))
    found = validate(base, adapter, merged, onnx=[e.output for e in exports], options=options, progress=progress)
    return {"bytes": {e.precision: sum(e.files.values()) for e in exports}} | as_json(found)


def bases(base: Path, text: Path, work: Path, progress: Console) -> dict[str, Any]:
    adapter, merged = ADAPTERS / "qlora-speeches", work / "merged-qlora"
    how = MergeOptions(training_quantization="nf4", training_double_quant=True)
    merge(base, adapter, merged, how, progress=progress)
    options = ValidationOptions(
        text=text, provider="cpu", merge=how, bases=CompareBases(requantize="nf4"), prompts=prompts(work)
    )
    return dict(as_json(validate(base, adapter, merged, options=options, progress=progress)))


def prompts(work: Path) -> Path:
    path = work / "prompts.txt"
    path.write_text("It is with great satisfaction that I\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=5, help="how many held-out messages the text is made of")
    parser.add_argument(
        "--save", type=Path, default=RESULTS / f"quality-SmolLM2-135M-{datetime.now(UTC):%Y-%m-%d}.json"
    )
    args = parser.parse_args()
    base = prepare_smollm2.model()
    with tempfile.TemporaryDirectory(prefix="quality-") as folder, Console() as progress:
        work = Path(folder)
        text = work / "held-out.txt"
        text.write_text(held_out(args.passages), encoding="utf-8")
        write_json(
            args.save,
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "model": "SmolLM2-135M-Instruct",
                "passages": args.passages,
                "versions": versions(),
                "precisions": precisions(base, text, work, progress),
                "bases": bases(base, text, work, progress),
            },
        )
    print(args.save)


if __name__ == "__main__":
    main()
