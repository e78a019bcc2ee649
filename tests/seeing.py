"""Folders of tiny models that see and write, as people have them: tokenizer, image processor, an adapter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.export_matrix.rows import ROWS

QWEN = "Qwen2_5_VLForConditionalGeneration"
# What transformers, transformers.js and onnxruntime-genai call these tokens; the ids are those of the tiny model.
QWEN_TOKENS = {44: "<|vision_start|>", 45: "<|vision_end|>", 47: "<|image_pad|>", 48: "<|video_pad|>"}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def save(folder: Path, row: str = QWEN, tokens: dict[int, str] | None = None) -> Any:
    """The model of a row of the matrix, with its tokens and its image processor."""
    model = ROWS[row].save(folder)
    name_tokens(folder, QWEN_TOKENS if tokens is None else tokens)
    vision = model.config.vision_config
    steps = dict.fromkeys(("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True)
    settings: dict[str, Any] = {**steps, "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}
    if row == QWEN:
        cells = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
                 "merge_size": vision.spatial_merge_size}  # fmt: skip
        settings |= {
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 64, "max_pixels": 4096, "size": {"shortest_edge": 64, "longest_edge": 4096}, **cells,
        }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return model


def name_tokens(folder: Path, tokens: dict[int, str]) -> None:
    """Give ids of the tiny tokenizer these names, as special tokens."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    words = document["model"]["vocab"]
    for number, name in tokens.items():
        del words[next(word for word, i in words.items() if i == number)]
        words[name] = number
        document["added_tokens"].append(
            {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
        )  # fmt: skip
    document["added_tokens"].sort(key=lambda token: token["id"])
    path.write_text(json.dumps(document))


def save_adapter(model: Any, folder: Path, seed: int = 2) -> None:
    """LoRA on the language model and on the vision tower, α ≠ r, large enough to change what is said."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    modules = r".*(language_model|visual|vision_tower).*(q_proj|v_proj|down_proj|qkv|fc1)"
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    tuned.save_pretrained(folder)


def picture(height: int = 16, width: int = 24) -> np.ndarray[Any, Any]:
    """(height, width, 3) bytes."""
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def patches(image: np.ndarray[Any, Any], vision: Any) -> dict[str, torch.Tensor]:
    """What Qwen's image processor makes of a picture whose sides are multiples of its cells."""
    side, merge, times = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    values = (torch.from_numpy(image).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    rows, columns = image.shape[0] // side, image.shape[1] // side
    cells = values.permute(2, 0, 1).reshape(3, rows // merge, merge, side, columns // merge, merge, side)
    flat = cells.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, side, side)
    pixels = flat.expand(-1, -1, times, -1, -1).reshape(rows * columns, -1)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])}
