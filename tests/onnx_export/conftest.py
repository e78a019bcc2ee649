"""Tiny models with random weights, each exported once a session."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from lora_export.choices import Precision
from lora_export.contracts import ExportOptions, ExportResult
from lora_export.graph_runs.feeds import Feed, token_feeds
from lora_export.graph_runs.signature import Signature
from lora_export.onnx_export import export
from lora_export.onnx_export.graphs.checks import open_model
from lora_export.onnx_export.quantize.blockwise import quantize_graph
from lora_export.onnx_export.quantize.settings import Blockwise
from lora_export.onnx_export.weights.map import Weight
from lora_export.progress import Silent

VOCABULARY = 100  # unlike every width below: the builder takes a Linear of that many outputs for the head


def quantized_graph(
    model: onnx.ModelProto, weights: Sequence[Weight], how: Blockwise
) -> tuple[onnx.ModelProto, list[Weight]]:
    opened = ir.from_proto(model)
    described = quantize_graph(opened, weights, how)
    return ir.to_proto(opened), described


def feeds_of(graph: Path, rows: Sequence[Sequence[int]]) -> list[Feed]:
    """One feed a row of token ids."""
    return token_feeds(Signature.of_model(open_model(graph), graph), rows)


def save_tokenizer(folder: Path) -> None:
    """Byte-level BPE, the kind that onnxruntime-genai reads, without merges: a character is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 4]
    words = ["<unk>", "<s>", "</s>", "<pad>", *characters]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def save_llama(folder: Path, seed: int, *, tied: bool = True, dtype: str = "float32") -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # the default makes logits so small that any graph would agree
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)  # all ones otherwise, whatever the seed
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}\n\n")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama", seed=0)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA with α ≠ r on a base that cannot be found under its recorded name."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters") / "lora"
    torch.manual_seed(2)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "nobody/there-is-no-such-model"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ExportResult]:
    """export(), remembering what was exported before."""
    root = tmp_path_factory.mktemp("exports")
    done: dict[tuple[Any, ...], ExportResult] = {}

    def get(
        model: Path, precision: Precision = "fp32", provider: str = "cpu", adapter: Path | None = None
    ) -> ExportResult:
        key = (model, precision, provider, adapter)
        if key not in done:
            done[key] = export(
                model, root / str(len(done)), ExportOptions(precision, provider), adapter=adapter, progress=Silent()
            )
        return done[key]

    return get


@pytest.fixture
def model_with(llama: Path, tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """A copy of the Llama folder whose config.json has other keys."""
    import shutil

    def make(changes: Mapping[str, Any]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(llama, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return make
