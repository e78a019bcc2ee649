"""Tiny random models and adapters, written by the libraries that real ones come from.

The numbers are chosen so that mistakes show: alpha ≠ rank, in ≠ out, B ≠ 0, every norm weight and bias random.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.adapters import AdapterFile, read_adapter
from lora_export.checkpoint import open_adapter_files
from lora_export.contracts import TargetUpdate

VOCABULARY = 101
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings; and forks stay safe


def llama_config(tied: bool = False, **changes: Any) -> transformers.LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return transformers.LlamaConfig(**(sizes | {"tie_word_embeddings": tied} | changes))


def gpt2_config() -> transformers.GPT2Config:
    return transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2
    )


def bert_config(**changes: Any) -> transformers.BertConfig:
    return transformers.BertConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3, **changes,
    )  # fmt: skip


def siglip_config(patch_size: int = 4) -> transformers.SiglipVisionConfig:
    """A vision tower whose pooling head is an nn.MultiheadAttention."""
    return transformers.SiglipVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=patch_size,
    )  # fmt: skip


def randomize(model: torch.nn.Module, seed: int, names: tuple[str, ...] = ("",), scale: float = 0.1) -> None:
    """Random values for every parameter whose name holds one of `names`; norm weights stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(n in name for n in names):
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.copy_(noise + 1 if "norm" in name.lower() and name.endswith("weight") else noise)


def save_base(
    folder: Path,
    model_class: type = transformers.LlamaForCausalLM,
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    seed: int = 1,
) -> Path:
    """A random model as transformers saves it."""
    model = model_class(llama_config() if config is None else config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load(folder: Path, model_class: type = transformers.LlamaForCausalLM, rows: int | None = None) -> Any:
    """The model in fp32, with its vocabulary resized to `rows` where training did that."""
    model = model_class.from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined]
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def save_adapter(
    folder: Path,
    base: Path,
    config: peft.LoraConfig,
    model_class: type = transformers.LlamaForCausalLM,
    seed: int = 2,
    rows: int | None = None,
    scale: float = 0.2,
    save_embeddings: str | bool = "auto",
) -> Path:
    """An adapter "trained" on `base`: everything that this configuration trains gets random values."""
    model = peft.get_peft_model(load(base, model_class, rows), config)
    trained = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    randomize(model, seed, trained, scale)
    if rows:
        randomize(model, seed + 1, ("embed_tokens", "lm_head"))
    model.save_pretrained(folder, save_embedding_layers=save_embeddings)
    return folder


def unmerged(
    base: Path, adapter: Path, model_class: type = transformers.LlamaForCausalLM, rows: int | None = None
) -> peft.PeftModel:
    """The oracle: PEFT's model with the adapter as it was saved, never merged."""
    return peft.PeftModel.from_pretrained(load(base, model_class, rows), str(adapter)).eval()


def token_ids(rows: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(9))


def logits(model: torch.nn.Module) -> torch.Tensor:
    """float64 logits (or the last hidden state) of the fixed prompt."""
    body: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    body.set_experts_implementation("eager")  # the grouped kernels know no float64
    with torch.no_grad():
        out = model.double()(token_ids())
    value: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return value


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder of safetensors files, read by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def lora(rank: int = 6, alpha: float = 15, **settings: Any) -> peft.LoraConfig:
    """alpha/rank is 2.5: a forgotten scaling shows."""
    chosen = {"target_modules": ["q_proj", "k_proj", "down_proj"]} | settings
    return peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, **chosen)


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def edit_tensors(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Rewrite a safetensors file with some tensors changed, added, or (None) removed."""
    merged = load_file(path) | changes
    save_file({k: v.contiguous() for k, v in merged.items() if v is not None}, path, {"format": "pt"})


def handmade_base(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A base of named random matrices and a config that says little: for what needs no model."""
    generator = torch.Generator().manual_seed(5)
    folder.mkdir(parents=True)
    values = {n: (torch.randn(s, generator=generator) * 0.02).to(dtype) for n, s in shapes.items()}
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    settings = {"model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def updates_of(
    folder: Path,
    values: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    models: frozenset[str] = frozenset(),
    factor: float = 1.0,
) -> list[TargetUpdate]:
    """What an adapter of these tensors does, whose names lack PEFT's prefix. models: the base's model_types."""
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{k}": v.contiguous() for k, v in values.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found, tensors = open_adapter_files(folder)
    file = AdapterFile(tensors, found, folder / "adapter_config.json", weight=factor, base_model_types=models)
    return list(read_adapter(file).updates)


def handmade_adapter(
    folder: Path, matrices: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float = 15, **config: Any
) -> Path:
    """module → (A, B) as PEFT names them."""
    folder.mkdir(parents=True)
    values = {}
    for module, (a, b) in matrices.items():
        values[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        values[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(values, folder / "adapter_model.safetensors")
    rank = next(iter(matrices.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder
