"""What of each adapter is left where several are merged: on a text of its own, along what it does alone."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from lora_export.contracts import AdapterChoice, MergeOptions, Progress, ValidationResult
from lora_export.validation.comparing.texts import read_text, windows
from lora_export.validation.effect import effect
from lora_export.validation.reference.foreign import as_peft
from lora_export.validation.reference.loading import load_merged
from lora_export.validation.reference.unmerged import load_unmerged


def own_texts(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    texts: Sequence[Path],
    options: MergeOptions,
    dequantized: Path | None,
    progress: Progress,
) -> ValidationResult:
    """Perplexities and survival, of the effect that each adapter has alone, with a weight of 1. texts: one for each
    adapter."""
    effects: list[tuple[str, Path, effect.Effect]] = []
    model: Any = None
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        for i, (choice, file) in enumerate(zip(adapters, texts, strict=True)):
            name = choice.folder.resolve().name
            progress.stage(f"validate: what is left of {name} on {file.name}")
            readable = as_peft(base, [AdapterChoice(choice.folder)], Path(scratch) / str(i))
            alone = load_unmerged(base, readable, options, dequantized)
            if model is None:
                model = load_merged(merged, alone.cls, alone.absent)[0]
            effects.append((name, file, _measured(alone.model, model, merged, file)))
    return ValidationResult(
        checks=(),
        perplexities=tuple(p for name, file, left in effects for p in left.perplexities(_named(name, file))),
        adapter_survival=tuple(left.survival(f"{name} in the merged model") for name, _, left in effects),
    )


def _named(adapter: str, file: Path) -> list[tuple[str, str]]:
    text = file.name
    return [("B", f"base on {text}"), ("M", f"{adapter} on {text}"), ("Q", f"merged on {text}")]


def _measured(alone: Any, model: Any, merged: Path, file: Path) -> effect.Effect:
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged, local_files_only=True)
    pieces = windows(tokenizer, read_text(file), alone.get_input_embeddings().num_embeddings, file)
    models = (effect.without_adapter(alone), effect.of(alone), effect.without_adapter(alone), effect.of(model))
    return effect.measured(pieces, models)
