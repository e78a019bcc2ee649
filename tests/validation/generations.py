"""Tiny models and adapters under the names that each generation of transformers gave their modules.

The older names are written out here, as files of those years have them: no table of transformers is asked.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.builders import VOCABULARY, randomize

Renaming = tuple[tuple[str, str], ...]  # from today's names, one after the other
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": VOCABULARY, "max_position_embeddings": 300,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYES: dict[str, Any] = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TOWER = (r"^model\.vision_tower\.(?!vision_model)", "model.vision_tower.vision_model.")
OLDEST: Renaming = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)


@dataclass(frozen=True)
class Family:
    """names: how each generation before today's called the modules; targets: what an adapter trains, by today's
    names, of the text and of the images; older: what those targets are called by a generation, if otherwise; saved:
    the head that an adapter may hold whole, none where it is tied."""

    model: Any
    config: Callable[[], Any]
    targets: tuple[str, ...]
    names: Mapping[str, Renaming]
    older: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    saved: tuple[str, ...] = ()

    def call(self, name: str, generation: str) -> str:
        for pattern, replacement in self.names.get(generation, ()):
            name = re.sub(pattern, replacement, name)
        return name

    def save(self, folder: Path, generation: str, dtype: torch.dtype = torch.float32) -> Path:
        """The base, its weights under the names of a generation."""
        torch.manual_seed(0)
        model = self.model(self.config())
        randomize(model, 1, scale=0.15)
        model.to(dtype).save_pretrained(folder)
        state = {self.call(n, generation): t.clone() for n, t in model.state_dict().items()}
        for tied in set(model.state_dict()) & set(model._tied_weights_keys or ()):
            if model.config.tie_word_embeddings:
                state.pop(self.call(tied, generation), None)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def train(self, folder: Path, generation: str, saved: bool = False) -> Path:
        """An adapter with random numbers, its tensors and its targets under the names of a generation."""
        torch.manual_seed(5)
        modules = list(self.saved) if saved else None
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=list(self.targets), modules_to_save=modules,
            rank_pattern={rf"1\..*{self.targets[0]}": 3},
        )  # fmt: skip
        tuned = peft.get_peft_model(self.model(self.config()), config)
        randomize(tuned, 2, tuple(n for n, p in tuned.named_parameters() if p.requires_grad), 0.1)
        tuned.save_pretrained(folder, save_embedding_layers=False)
        state = load_file(folder / "adapter_model.safetensors")
        start = "base_model.model."
        save_file(
            {start + self.call(n.removeprefix(start), generation): t for n, t in state.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        file = folder / "adapter_config.json"
        told = json.loads(file.read_text())
        told["target_modules"] = list(self.older.get(generation, self.targets))
        told["rank_pattern"] = {rf"1\..*{told['target_modules'][0]}": 3}
        file.write_text(json.dumps(told))
        return folder


def _seeing(config: Any, text: Any, vision: Any, **more: Any) -> Callable[[], Any]:
    return lambda: config(text_config=text(), vision_config=vision(), **more)


def _vit() -> Any:
    return transformers.ViTConfig(**EYES, num_labels=3)


def _llava() -> Any:
    text = transformers.LlamaConfig(**TEXT)
    eyes = transformers.CLIPVisionConfig(**EYES)
    return transformers.LlavaConfig(text_config=text, vision_config=eyes, image_token_index=90)


def _gemma3() -> Any:
    text = transformers.Gemma3TextConfig(
        **TEXT, sliding_window=20, layer_types=["sliding_attention", "full_attention"]
    )
    eyes = transformers.SiglipVisionConfig(**EYES, vision_use_head=False)
    return transformers.Gemma3Config(
        text_config=text, vision_config=eyes, mm_tokens_per_image=4, image_token_index=90, boi_token_index=91,
        eoi_token_index=92,
    )  # fmt: skip


def _mistral3() -> Any:
    text = transformers.MistralConfig(**TEXT)
    eyes = transformers.PixtralVisionConfig(**EYES, head_dim=10)
    return transformers.Mistral3Config(
        text_config=text, vision_config=eyes, image_token_index=90, spatial_merge_size=1, tie_word_embeddings=False
    )


def _paligemma() -> Any:
    text = transformers.GemmaConfig(**TEXT)
    eyes = transformers.SiglipVisionConfig(**EYES, vision_use_head=False, projection_dim=48)
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=eyes, image_token_index=90, projection_dim=48
    )


_QWEN = {k: v for k, v in TEXT.items() if k != "head_dim"}
_ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}


def _qwen2_vl() -> Any:
    eyes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "hidden_size": 48, "mlp_ratio": 2, "patch_size": 4}
    return transformers.Qwen2VLConfig(text_config=_QWEN | {"rope_parameters": _ROPE}, vision_config=eyes, **_TOKENS)


def _qwen2_5_vl() -> Any:
    eyes = {
        "depth": 2, "hidden_size": 40, "num_heads": 4, "out_hidden_size": 48, "intermediate_size": 56,
        "patch_size": 4, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config=_QWEN | {"rope_parameters": _ROPE}, vision_config=eyes, **_TOKENS
    )


_CLIP_TOWER = (*OLDEST, (r"^model\.vision_tower\.", "vision_tower.vision_model."))
_QWEN_OLD = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
_VIT_OLD = (
    (r"\blayers\.", "encoder.layer."),
    (r"attention\.([qkv])_proj", r"attention.attention.\1_proj"),
    (r"\.q_proj", ".query"),
    (r"\.k_proj", ".key"),
    (r"\.v_proj", ".value"),
    (r"attention\.o_proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)
SEES = ("q_proj", "v_proj", "fc1")
FAMILIES: dict[str, Family] = {
    "vit": Family(transformers.ViTForImageClassification, _vit, ("q_proj", "v_proj", "fc2"), {"4": _VIT_OLD},
                  {"4": ("query", "value", "output.dense")}, ("classifier",)),
    "llava": Family(transformers.LlavaForConditionalGeneration, _llava, (*SEES, "linear_1"),
                    {"4": _CLIP_TOWER, "4.52": (TOWER,)}, {}, ("lm_head",)),
    "gemma3": Family(transformers.Gemma3ForConditionalGeneration, _gemma3, SEES,
                     {"4": _CLIP_TOWER, "4.52": (TOWER,)}),
    "paligemma": Family(transformers.PaliGemmaForConditionalGeneration, _paligemma, SEES,
                        {"4": _CLIP_TOWER, "4.52": (TOWER,)}),
    "mistral3": Family(transformers.Mistral3ForConditionalGeneration, _mistral3, ("q_proj", "o_proj", "linear_2"),
                       {"4": (*OLDEST, (r"^model\.vision_tower\.", "vision_tower."))}, {}, ("lm_head",)),
    "qwen2_vl": Family(transformers.Qwen2VLForConditionalGeneration, _qwen2_vl, ("q_proj", "qkv", "fc1"),
                       {"4": _QWEN_OLD}, {}, ("lm_head",)),
    "qwen2_5_vl": Family(transformers.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl, ("v_proj", "qkv", "up_proj"),
                         {"4": _QWEN_OLD}, {}, ("lm_head",)),
}  # fmt: skip
CELLS = [
    (name, of_adapter, of_base, saved)
    for name, family in FAMILIES.items()
    for of_adapter in ("5", *family.names)
    for of_base in ("5", *family.names)
    for saved in (False, True)[: 2 if family.saved else 1]
]
