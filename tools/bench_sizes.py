"""What quantized exports of a decoder and an encoder weigh, their embeddings among it, and what they then compute.

    python tools/bench_sizes.py

SmolLM2 with an adapter of `examples/adapters`, on held-out text, without a session for each proof that `validate`
makes (`bench_quality.py` has those); MiniLM on sentences of the same messages. On the CPU, from the graphs' own
outputs. gptq is calibrated on other messages, or other sentences. Takes about eight minutes on two cores.
"""

import argparse
import json
import re
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bench_quality import ADAPTERS, held_out
from processes import HERE, RESULTS

from lora_export import export, merge
from lora_export.choices import Precision, Quantizer
from lora_export.contracts import ExportOptions, ExportResult, QuantizationOptions
from lora_export.manifest import versions
from lora_export.onnx_export.quantize.settings import STATISTICS
from lora_export.onnx_export.weights.map import ITEM_SIZE
from lora_export.progress import Console
from lora_export.runtime import open_session
from lora_export.storage.sealed import write_json

sys.path.insert(0, str(HERE.parent / "examples"))
import prepare_smollm2

TOKENS, SENTENCES, CHARACTERS = 448, 200, 5000
CALIBRATED = 12  # messages
DECODER = (("int8", "default"), ("int4", "default"), ("int4", "gptq"))
ENCODER = (*DECODER, ("nf4", "default"))
_TABLES = re.compile(r"embed|lm_head")


def decoder(work: Path, progress: Console) -> list[dict[str, Any]]:
    base, merged = prepare_smollm2.model(), work / "merged"
    merge(base, ADAPTERS / "lora-speeches", merged, progress=progress)
    reader = transformers.AutoTokenizer.from_pretrained(base)
    ids = reader(held_out(5), return_tensors="pt")["input_ids"][:, :TOKENS]
    plain, tuned = (_in_torch(folder, ids) for folder in (base, merged))
    change = tuned.exp() - plain.exp()
    rows = []
    texts = [f.read_text(encoding="utf-8")[CHARACTERS : 2 * CHARACTERS] for f in _trained_on()[::7]]
    for precision, quantizer in DECODER:
        options = _options(precision, quantizer, texts[:CALIBRATED], work / "messages.txt")
        made = export(merged, work / f"{precision}-{quantizer}", options=options, progress=progress)
        again = ExportOptions(graph_from=made.output)
        other = export(base, work / f"{precision}-{quantizer}-base", options=again, progress=progress)
        found, found_base = (_in_graph(result, ids) for result in (made, other))
        rows.append(
            _sizes(made)
            | {
                "kept": float((change * (found - found_base)).sum() / (change * (tuned - plain)).sum()),
                "same_token": float((found.argmax(-1) == tuned.argmax(-1)).float().mean()),
                "perplexity": _perplexity(found, ids),
                "perplexity_fp32": _perplexity(tuned, ids),
            }
        )
    return rows


def encoder(work: Path, progress: Console) -> list[dict[str, Any]]:
    model = prepare_smollm2.minilm()
    texts = [_sentences(f) for f in sorted(prepare_smollm2.speeches().glob("*.txt"))]
    given = transformers.AutoTokenizer.from_pretrained(model)(
        [s for some in texts for s in some][:SENTENCES], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        plain = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
        wanted = _pooled(plain(**given).last_hidden_state, given["attention_mask"])
    rows = []
    others = [s for f in _trained_on() for s in _sentences(f, 20, 27)]
    for precision, quantizer in ENCODER:
        options = _options(precision, quantizer, others, work / "sentences.txt")
        made = export(model, work / f"minilm-{precision}-{quantizer}", options=options, progress=progress)
        session = open_session(made.model, "cpu")
        feed = {i.name: given[i.name].numpy() for i in session.get_inputs()}
        (states,) = session.run(["last_hidden_state"], feed)
        cosines = (_pooled(torch.from_numpy(states), given["attention_mask"]) * wanted).sum(-1)
        rows.append(_sizes(made) | {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min())})
    return rows


def _options(precision: Precision, quantizer: Quantizer, texts: list[str], file: Path) -> ExportOptions:
    """The texts are written into `file`, a line each."""
    file.write_text("\n".join(" ".join(t.split()) for t in texts) + "\n", encoding="utf-8")
    calibration = file if quantizer == "gptq" else None
    how = QuantizationOptions(algorithm=quantizer, calibration=calibration)
    return ExportOptions(precision, "cpu", quantization=how)


def _trained_on() -> list[Path]:
    """Messages that were not held out of training."""
    files = sorted(prepare_smollm2.speeches().glob("*.txt"))
    return [f for i, f in enumerate(files) if i % 10 != 9]


def _sizes(made: ExportResult) -> dict[str, Any]:
    """Bytes of the folder, and of the weights that are embeddings or a head."""
    described = json.loads((made.output / "weights-map.json").read_text(encoding="utf-8"))["weights"]
    tables = [w for w in described if _TABLES.search(w["name"]) and w["made_of"]]
    weigh = sum(ITEM_SIZE[w["dtype"]] * int(np.prod(w["shape"])) for w in tables)
    size = sum(size for name, size in made.files.items() if name != STATISTICS)
    how = made.quantized.quantizer if made.quantized else "default"
    name = made.precision if how == "default" else f"{made.precision}, {how}"
    return {"precision": name, "bytes": size, "tables": weigh}


def _in_torch(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return torch.log_softmax(model(ids).logits, -1)


def _in_graph(made: ExportResult, ids: torch.Tensor) -> torch.Tensor:
    session = open_session(made.model, "cpu")
    given = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    given["position_ids"] = np.arange(ids.shape[1])[None]
    for value in session.get_inputs():
        if value.name not in given:
            given[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    feed = {i.name: given[i.name] for i in session.get_inputs()}
    return torch.log_softmax(torch.from_numpy(session.run(["logits"], feed)[0]), -1)


def _perplexity(logs: torch.Tensor, ids: torch.Tensor) -> float:
    return float((-logs[:, :-1].gather(2, ids[:, 1:, None]).mean()).exp())


def _sentences(file: Path, start: int = 5, stop: int = 7) -> list[str]:
    """Some from within a message."""
    words = re.split(r"(?<=[.!?])\s+", " ".join(file.read_text(encoding="utf-8").split()))
    return [w for w in words if 40 < len(w) < 160][start:stop]


def _pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[..., None].float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=RESULTS / f"sizes-{datetime.now(UTC):%Y-%m-%d}.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sizes-") as folder, Console() as progress:
        work = Path(folder)
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "tokens": TOKENS,
            "sentences": SENTENCES,
            "versions": versions(),
            "SmolLM2-135M": decoder(work, progress),
            "all-MiniLM-L6-v2": encoder(work, progress),
        }
        write_json(args.save, result)
    print(args.save)


if __name__ == "__main__":
    main()
