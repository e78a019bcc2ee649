"""Two tiny runs, a decoder's and an encoder's, each made once by merge-and-export; and packages of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora_export.contracts import (
    AdapterChoice,
    BenchmarkOptions,
    ExportOptions,
    PackageOptions,
    PackageResult,
    Source,
    StoryOptions,
    ValidationOptions,
)
from lora_export.pipeline import merge_and_export
from lora_export.progress import Silent
from lora_export.workflows.packaging import package

VOCABULARY = 10 + 96
THETA = 500.0  # far from every default, so that a model with another one says something else
CARD = "---\nlicense: apache-2.0\nlanguage: en\n---\n\n# A base\n"


def save_tokenizer(folder: Path, *names: str) -> None:
    """A character of ASCII is a token, from 10 on, so that whatever a model says can be read back.

    names: what the model reads beside ids.
    """
    alphabet = ["Ċ", "Ġ", *(chr(i) for i in range(33, 127))]  # newline and space, as byte-level BPE has them
    words = [f"<{i}>" for i in range(10)]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate([*words, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=words[1], eos_token=words[2], pad_token=words[3],
        model_input_names=["input_ids", *names, "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def save_decoder(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))
    model.generation_config.temperature, model.generation_config.top_k = 0.7, 13
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n\n")
    (folder / "LICENSE.txt").write_text("The licence of the base.\r\n")
    (folder / "NOTICE").write_text("A notice.\n")
    (folder / "README.md").write_text(CARD)
    return folder


def save_encoder(folder: Path) -> Path:
    torch.manual_seed(4)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, "token_type_ids")
    return folder


def save_lora(base: Path, folder: Path, targets: list[str]) -> Path:
    """B of a size that an adapter has: the outputs change, and do not become others altogether."""
    cls = getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])
    tuned = get_peft_model(cls.from_pretrained(base), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    tuned.save_pretrained(folder)
    return folder


def make_run(base: Path, adapter: Path, out: Path) -> Path:
    quick = BenchmarkOptions(shapes=((1, 8),), max_seconds=2)
    export, validation = ExportOptions(provider="cpu"), ValidationOptions(rows=8, seed=1)
    chosen = StoryOptions(export=export, benchmark=quick, validation=validation)
    sources = Source(base.name, base), [AdapterChoice(adapter)]
    merge_and_export(*sources, out, chosen, Silent())
    return out


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """base, adapter, run."""
    root = tmp_path_factory.mktemp("decoder")
    base = save_decoder(root / "base")
    adapter = save_lora(base, root / "adapter", ["q_proj", "v_proj", "down_proj"])
    return base, adapter, make_run(base, adapter, root / "run")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("encoder")
    base = save_encoder(root / "base")
    adapter = save_lora(base, root / "adapter", ["query", "value"])
    return base, adapter, make_run(base, adapter, root / "run")


@pytest.fixture(scope="session")
def decoder_run(decoder: tuple[Path, Path, Path]) -> Path:
    return decoder[2]


@pytest.fixture(scope="session")
def encoder_run(encoder: tuple[Path, Path, Path]) -> Path:
    return encoder[2]


Packed = Callable[..., PackageResult]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """packed(run, target, **options) → the package, made once; not to be changed."""
    root = tmp_path_factory.mktemp("packages")
    done: dict[tuple[Any, ...], PackageResult] = {}

    def get(run: Path, target: str, **options: Any) -> PackageResult:
        key = (run, target, *sorted(options.items()))
        if key not in done:
            place = root / f"{len(done)}" / target
            done[key] = package(run, target, place, PackageOptions(**options), Silent())
        return done[key]

    return get


@pytest.fixture
def copied(packed: Packed, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a package, free to be spoiled."""

    def get(run: Path, target: str, **options: Any) -> Path:
        return Path(shutil.copytree(packed(run, target, **options).output, tmp_path / "package"))

    return get
