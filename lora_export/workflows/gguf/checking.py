"""GGUF files, checked by this project's own reader: their settings, their template, and every weight in them.

What is compared with the merged folder is read without the converter, so its faults are found.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.allowed import check_gguf
from lora_export.contracts import TensorSource
from lora_export.errors import ExportError
from lora_export.packages.gguf import lora_file
from lora_export.packages.job import Run
from lora_export.storage import sealed

if TYPE_CHECKING:
    import torch

    from lora_export.quantization.stored import QuantizedWeight

_TEMPLATE = "tokenizer.chat_template"
_ROWS = 2**22  # numbers that are compared at a time
_STORED = ("F32", "F16", "BF16", "Q8_0")
_BLOCK = 32  # numbers of Q8_0 that share a scale
# Of the largest number of a block: half a step of its 127, and a scale that is rounded to fp16 times 127 steps.
_Q8_ERROR = 0.5 / 127 + 2.0**-11 + 2.0**-20


def check_files(folder: Path, name: str) -> None:
    """CheckpointError for a GGUF file in a package that is damaged, or says what is on no list."""
    from lora_export.checkpoint.gguf import read_gguf

    for path in sorted(folder.glob("*.gguf")):
        file = read_gguf(path)
        check_gguf(file.settings, file.tensors, path, adapter=path.name == lora_file(name))


def compare(path: Path, run: Run, work: Path) -> dict[str, Any]:
    """How the weights of a GGUF file compare with the merged ones. ExportError if they are not those.

    work: a folder on the same file system.

    weights: how many were compared, 0 for an architecture whose layout this project does not know; largest_error:
    of a number, relative to the largest of its 32 neighbours, where it is not exactly what the type makes of it.
    """
    from lora_export.checkpoint.gguf import read_gguf
    from lora_export.checkpoint.reader import open_checkpoint
    from lora_export.quantization.gguf import ARCHITECTURES
    from lora_export.quantization.registry import find_quantized

    assert run.merged is not None
    settings = read_gguf(path).settings
    _check_template(settings, run, path)
    kinds = ARCHITECTURES.get(str(settings["general.architecture"]), ())
    if run.config.get("model_type") not in kinds:
        return {"against": "merged", "weights": 0, "largest_error": None}
    merged = open_checkpoint(run.merged)
    with tempfile.TemporaryDirectory(dir=work) as place:
        Path(place, path.name).hardlink_to(path)
        sealed.write_settings(Path(place, "config.json"), run.config)
        read = open_checkpoint(Path(place))
        worst = [_compared(weight, read, merged, path) for weight in find_quantized(read, read.config).values()]
    return {"against": "merged", "weights": len(worst), "largest_error": max(worst, default=0.0)}


def _check_template(settings: Mapping[str, object], run: Run, path: Path) -> None:
    wanted = template_of(run.companions)
    there = settings.get(_TEMPLATE)
    if there != wanted and there != "":  # the reader leaves out a string of more than 64 KiB
        raise ExportError(
            "the chat template in the GGUF file is not that of the base",
            where=path,
            expected="the same text" if wanted else "none",
            next_step="package it --for genai, optimum or hf",
        )


def template_of(folder: Path) -> str | None:
    """The template for chats of a model's folder; None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    told = sealed.read_json(config).get("chat_template") if config.is_file() else None
    if isinstance(told, list):  # several, by their names
        told = next((t.get("template") for t in told if isinstance(t, dict) and t.get("name") == "default"), None)
    return told if isinstance(told, str) else None


def _compared(weight: "QuantizedWeight", read: TensorSource, merged: TensorSource, path: Path) -> float:
    """The largest error of a weight; ExportError if it is larger than its type allows."""
    rows, kind = weight.load(read), read.tensors[weight.parts[0]].dtype
    if weight.weight not in merged.tensors or kind not in _STORED:
        raise _other(path, weight.weight, f"a weight of type {kind} that the merged folder does not have")
    height = weight.shape[0]
    step = max(1, _ROWS // max(1, merged.tensors[weight.weight].nbytes // height))
    added = float(getattr(rows, "less", 0.0))
    worst = 0.0
    for start in range(0, height, step):
        stop = min(start + step, height)
        wanted = merged.read_rows(weight.weight, start, stop).float()
        error = _error(rows.rows(start, stop), (wanted + added) - added, kind)
        if not error <= (_Q8_ERROR if kind == "Q8_0" else 0.0):  # NaN is an error as well, and no maximum keeps it
            raise _other(path, weight.weight, f"an error of {error:.2g} in {kind}")
        worst = max(worst, error)
    return worst


def _error(there: "torch.Tensor", wanted: "torch.Tensor", kind: str) -> float:
    """0 where every number is what the type makes of it; NaN where one is none."""
    import torch

    if kind != "Q8_0":
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        wanted = wanted.to(dtype).float()
    blocks = [t.double().reshape(-1, _BLOCK if t.numel() % _BLOCK == 0 else t.shape[-1]) for t in (there, wanted)]
    apart = (blocks[0] - blocks[1]).abs()
    largest = blocks[1].abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return float((apart / largest).max())


def _other(path: Path, weight: str, found: str) -> ExportError:
    return ExportError(
        f"the GGUF file does not hold the merged weights: {found}",
        where=path,
        tensor=weight,
        expected="each number of the merged model, rounded once",
        next_step="a wider type: --variant bf16 or f32",
    )
