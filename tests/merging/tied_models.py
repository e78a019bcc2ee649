"""Tiny models whose embeddings are tied, each in another way, and adapters; the oracle is PEFT's forward."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

from lora_export.contracts import AdapterChoice, MergeOptions, MergeResult
from lora_export.merging import merge
from tests.builders import VOCABULARY, bert_config, gpt2_config, llama_config, lora, randomize

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_SPEECH = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2,
}  # fmt: skip
_GEMMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def _gemma() -> Any:
    sees = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    tokens = {"mm_tokens_per_image": 4, "boi_token_index": 97, "eoi_token_index": 98, "image_token_index": 99}
    config = transformers.Gemma3Config(text_config=_GEMMA | _IDS, vision_config=sees, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


def _mamba() -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, tie_word_embeddings=True, **_IDS))


def _zamba() -> Any:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8, "n_mamba_heads": 2,
    }  # fmt: skip
    return transformers.ZambaForCausalLM(transformers.ZambaConfig(**sizes, **_IDS))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(llama_config(tied=True)),
    "untied llama": lambda: transformers.LlamaForCausalLM(llama_config()),
    "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2_config()),
    "bert": lambda: transformers.BertForMaskedLM(bert_config()),
    "mamba": _mamba,
    "zamba": _zamba,  # its attention blocks are tied, too
    "gemma3": _gemma,
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**_SPEECH, **_IDS)),
    "whisper decoder": lambda: transformers.WhisperForCausalLM(transformers.WhisperConfig(**_SPEECH, **_IDS)),
}


@dataclass(frozen=True)
class Cell:
    """An adapter on one of MODELS. settings: of its LoraConfig, EMBEDDING and HEAD in them stand for the names of
    these modules; rows: of the vocabulary in training, None for the base's."""

    model: str
    settings: dict[str, Any]
    rows: int | None = None
    save: str | bool = "auto"

    def __str__(self) -> str:
        what = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.model}: {what}, {self.rows} rows, {self.save}"

    def make(self, folder: Path) -> None:
        """folder/base and folder/adapter."""
        model = MODELS[self.model]()
        randomize(model, 1)
        model.tie_weights()
        model.save_pretrained(folder / "base")
        trained = self._loaded(folder)
        body = trained.named_modules(remove_duplicate=False)
        inside, outside = trained.get_input_embeddings(), trained.get_output_embeddings()
        names = {
            "EMBEDDING": next(n for n, m in trained.named_modules() if m is inside),
            "HEAD": next(n for n, m in body if m is outside),
        }
        settings = {"target_modules": [_a_linear_layer(trained)]} | _filled(self.settings, names)
        trained = peft.get_peft_model(trained, lora(**settings))
        randomize(trained, 2, tuple(n for n, p in trained.named_parameters() if p.requires_grad), 0.2)
        trained.save_pretrained(folder / "adapter", save_embedding_layers=self.save)

    def _loaded(self, folder: Path) -> Any:
        model = type(MODELS[self.model]()).from_pretrained(folder / "base", dtype=torch.float32)
        if self.rows:
            torch.manual_seed(3)
            model.resize_token_embeddings(self.rows, mean_resizing=False)
        return model.eval()

    def merge(self, folder: Path) -> MergeResult:
        return merge(folder / "base", [AdapterChoice(folder / "adapter")], folder / "out", MergeOptions())

    def error(self, folder: Path) -> float:
        """Of the merged model's logits against the unmerged model's, of the largest of those; both in float64."""
        unmerged = peft.PeftModel.from_pretrained(self._loaded(folder), str(folder / "adapter")).get_base_model()
        merged, told = type(unmerged).from_pretrained(folder / "out", dtype=torch.float32, output_loading_info=True)
        assert not (told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"])
        wanted, found = _logits(unmerged), _logits(merged)
        assert found.shape == wanted.shape
        return float((found - wanted).abs().max() / wanted.abs().max())


def _logits(model: Any) -> torch.Tensor:
    ids = torch.randint(6, 90, (2, 11), generator=torch.Generator().manual_seed(9))
    decoder = {"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model.double().eval()(input_ids=ids, **decoder).logits
    return found


def _a_linear_layer(model: Any) -> str:
    """The first of a layer's own; the blocks that layers share are targets of their own cells."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return next(
        n
        for n, m in model.named_modules()
        if isinstance(m, kinds) and any(c.isdigit() for c in n) and "shared" not in n
    )


def _filled(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(k, k): _filled(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value
