"""What of each adapter is left where several are merged: on a text of its own, along what it does alone."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.contracts import AdapterChoice, AdapterSurvival, MergeOptions, Perplexity, Progress
from lora_export.validation.comparing.text import read_text, windows
from lora_export.validation.effect import effect
from lora_export.validation.reference.foreign import as_peft
from lora_export.validation.reference.loading import load_merged
from lora_export.validation.reference.unmerged import load_unmerged


@dataclass(frozen=True)
class OwnTexts:
    perplexities: tuple[Perplexity, ...]
    adapter_survival: tuple[AdapterSurvival, ...]


def own_texts(
    base: Path,
    adapters: Sequence[AdapterChoice],
    merged: Path,
    texts: Sequence[Path],
    options: MergeOptions,
    dequantized: Path | None,
    progress: Progress,
) -> OwnTexts:
    """texts: one for each adapter. Survival is of the effect that the adapter has alone, with a weight of 1."""
    perplexities: list[Perplexity] = []
    survivals: list[AdapterSurvival] = []
    model: Any = None
    with tempfile.TemporaryDirectory(prefix="lora-export-") as scratch:
        for choice, file in zip(adapters, texts, strict=True):
            name = choice.folder.resolve().name
            progress.stage(f"validate: what is left of {name} on {file.name}")
            readable = as_peft(base, [AdapterChoice(choice.folder)], Path(scratch) / str(len(survivals)))
            alone = load_unmerged(base, readable, options, dequantized)
            if model is None:
                model = load_merged(merged, alone.cls, alone.absent)[0]
            found = _measure(alone.model, model, merged, file)
            survivals.append(found.survival(f"{name} in the merged model"))
            of = [("B", f"base on {file.name}"), ("M", f"{name} on {file.name}"), ("Q", f"merged on {file.name}")]
            perplexities += found.perplexities(of)
    return OwnTexts(tuple(perplexities), tuple(survivals))


def _measure(alone: Any, model: Any, merged: Path, file: Path) -> effect.Effect:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(merged, local_files_only=True)
    pieces = windows(tokenizer, read_text(file), alone.get_input_embeddings().num_embeddings, file)
    models = (effect.without_adapter(alone), effect.of(alone), effect.without_adapter(alone), effect.of(model))
    found = effect.Effect()
    for ids in pieces:
        found.add(ids, *(logits_of(ids) for logits_of in models))
    return found
