"""A tiny Llama with a tokenizer, an adapter with trained-looking matrices, and honest merges of it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_export.contracts import (
    AdapterChoice,
    Check,
    ExportedPair,
    MergeOptions,
    ValidationOptions,
    ValidationResult,
)
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import validate

VOCABULARY = 320


def save_tokenizer(folder: Path) -> None:
    """Every byte is a token, so that any prompt has many."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_base(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=600,  # one of the lengths on which models are compared
        tie_word_embeddings=True,
        initializer_range=0.2,
        dtype=dtype,
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    tuned.save_pretrained(folder)
    return folder


def judged(
    base: Path,
    adapters: Path | Sequence[AdapterChoice],
    merged: Path,
    exports: Sequence[ExportedPair] = (),
    **options: Any,
) -> ValidationResult:
    """A validation on the CPU. adapters: one adapter's folder, or choices; options: of ValidationOptions."""
    choices = [AdapterChoice(adapters)] if isinstance(adapters, Path) else adapters
    settings = ValidationOptions(provider="cpu", **options)
    return validate(base, choices, merged, exports=exports, options=settings, progress=Silent())


def failed(result: ValidationResult) -> list[Check]:
    return [c for c in result.checks if not c.passed]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """dtype name → (base, adapter), made once."""
    root = tmp_path_factory.mktemp("validation")
    made: dict[str, tuple[Path, Path]] = {}

    def get(dtype: str) -> tuple[Path, Path]:
        if dtype not in made:
            base = save_base(root / f"base-{dtype}", getattr(torch, dtype))
            made[dtype] = base, save_adapter(base, root / f"adapter-{dtype}")
        return made[dtype]

    return get


@pytest.fixture
def merged(folders: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Callable[[str], Path]:
    """dtype name → a fresh honest merge, free to be spoiled."""

    def get(dtype: str) -> Path:
        base, adapter = folders(dtype)
        merge(base, [AdapterChoice(adapter)], tmp_path / "merged", MergeOptions(force=True))
        return tmp_path / "merged"

    return get
