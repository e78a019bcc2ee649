"""onnxruntime-genai's folder of a vision-language model: its graphs, and how pictures become their inputs.

genai puts the features into the rows of embeddings by a graph, which has to do it: the embedding's graph gets the
features as another input. A row may be wider than an embedding (it carries what else the decoder wants to know of
a picture), and genai is told that width as the hidden size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lora_export.allowed.genai_config import VISION
from lora_export.contracts import ExportResult
from lora_export.errors import InputError
from lora_export.packages import graphs
from lora_export.packages.job import Run
from lora_export.storage import sealed

# The kinds that genai can prepare pictures for, and the mark that its prompts have for one.
PICTURE: Mapping[str, str] = {
    "gemma3": "<start_of_image>",
    "qwen2_5_vl": "<|vision_start|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|vision_end|>",
}
_GEMMA_TOKENS = 256  # of a picture, a constant of genai's
_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_SESSION = {"log_id": "onnxruntime-genai", "provider_options": []}


def is_one(export: ExportResult) -> bool:
    return export.kind == "vision-language"


def check(run: Run) -> None:
    """InputError for a model whose pictures genai cannot prepare."""
    kind = str(run.config.get("model_type"))
    if kind not in PICTURE:
        raise InputError(
            f"onnxruntime-genai does not prepare pictures for {kind}",
            where=run.folder,
            expected=", ".join(PICTURE),
            next_step="--for transformers-js",
        )
    tokens = run.config.get("mm_tokens_per_image", _GEMMA_TOKENS)
    if kind == "gemma3" and tokens != _GEMMA_TOKENS:
        raise InputError(
            f"the model has {tokens} tokens a picture, and onnxruntime-genai always takes {_GEMMA_TOKENS}",
            where=run.companions / "config.json",
            expected=f"mm_tokens_per_image {_GEMMA_TOKENS}",
            next_step="--for transformers-js",
        )
    _image_settings(run)


def lay(run: Run, export: ExportResult, stage: Path) -> dict[str, Any]:
    """Write the graphs and how pictures are prepared; genai_config.json, which is not written yet."""
    vision, embedding, decoder = (ir.load(path) for path in export.paths)
    if run.config["model_type"] == "gemma3":
        _one_row_a_picture(vision)
    put_in(embedding, _placeholder(run.config), by_picture=run.config["model_type"] == "gemma3")
    for model, path in zip((vision, embedding, decoder), export.paths, strict=True):
        graphs.save(model, stage / path.name, f"{path.name}.data", largest=2**62)
    sealed.write_json(stage / VISION, _preparation(run))
    return _config(run, export, int(embedding.graph.outputs[0].shape[-1]), decoder)


def put_in(model: ir.Model, placeholder: int, by_picture: bool = False) -> None:
    """Give the graph of an embedding the input image_features (tokens, width), put where the ids have placeholders.

    by_picture: the input is (pictures, tokens, width). Fewer features than placeholders go to the first ones.
    """
    graph = model.graph
    (ids,), (rows,) = graph.inputs, graph.outputs
    assert rows.shape is not None
    shape = ["num_images", "image_tokens", rows.shape[-1]] if by_picture else ["image_tokens", rows.shape[-1]]
    features = ir.Value(name="image_features", type=ir.TensorType(rows.dtype), shape=ir.Shape(shape))
    graph.inputs.append(features)
    name = rows.name
    rows.name = f"{name}_of_text"

    def add(kind: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, num_outputs=1, name=f"pictures/{len(graph)}_{kind}")
        node.outputs[0].name = f"pictures/{len(graph)}_{kind}_out"
        graph.append(node)
        return node.outputs[0]

    def constant(values: Any) -> ir.Value:
        return add("Constant", [], value=ir.tensor(np.asarray(values, np.int64)))

    flat = add("Reshape", [features, constant([-1, rows.shape[-1]])]) if by_picture else features
    places = add("NonZero", [add("Equal", [ids, constant(placeholder)])])
    count = add("Slice", [add("Shape", [flat]), constant([0]), constant([1])])
    found = add("Slice", [add("Transpose", [places], perm=[1, 0]), constant([0]), count, constant([0])])
    result = add("ScatterND", [rows, found, flat])
    result.name, result.type, result.shape = name, rows.type, rows.shape
    graph.outputs[0] = result


def _one_row_a_picture(model: ir.Model) -> None:
    """Let the features be (pictures, tokens, width): genai counts Gemma's pictures, not their tokens."""
    graph = model.graph
    features = graph.outputs[0]
    assert features.shape is not None
    name, width = features.name, int(features.shape[-1])
    features.name = f"{name}_flat"
    sizes = ir.node(
        "Constant", [], {"value": ir.tensor(np.array([-1, _GEMMA_TOKENS, width], np.int64))}, name="pictures/sizes"
    )
    sizes.outputs[0].name = "pictures/sizes"
    node = ir.node("Reshape", [features, sizes.outputs[0]], num_outputs=1, name="pictures/split")
    node.outputs[0].name, node.outputs[0].type = name, features.type
    node.outputs[0].shape = ir.Shape(["num_images", _GEMMA_TOKENS, width])
    graph.extend([sizes, node])
    graph.outputs[0] = node.outputs[0]


def _placeholder(config: Mapping[str, Any]) -> int:
    return int(next(config[n] for n in ("image_token_id", "image_token_index") if config.get(n) is not None))


# --- configurations --------------------------------------------------------------------------------------------


def _config(run: Run, export: ExportResult, width: int, decoder: ir.Model) -> dict[str, Any]:
    text, vision = run.config["text_config"], run.config["vision_config"]
    past = next(v for v in decoder.graph.inputs if str(v.name).endswith(".key"))
    assert past.shape is not None
    names = [path.name for path in export.paths]
    ids = {n: run.config[n] for n in ("video_token_id", "vision_start_token_id") if run.config.get(n) is not None}
    special = {n: text.get(n) or run.config.get(n) or 0 for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    seen = {"pixel_values": "pixel_values"}
    sizes = {}
    if "spatial_merge_size" in vision:
        seen["image_grid_thw"] = "image_grid_thw"
        sizes = {n: vision[n] for n in ("spatial_merge_size", "patch_size")}
    length = int(text["max_position_embeddings"])
    return {
        "model": {
            **special, **ids,
            "type": run.config["model_type"],
            "image_token_id": _placeholder(run.config),
            "context_length": length,
            "vocab_size": text["vocab_size"],
            "vision": {
                "filename": names[0], "config_filename": VISION, **sizes, "inputs": seen,
                "outputs": {"image_features": "image_features"}, "session_options": _SESSION,
            },
            "embedding": {
                "filename": names[1], "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"}, "session_options": _SESSION,
            },
            "decoder": {
                "filename": names[2],
                "hidden_size": width,
                "head_size": int(past.shape[3]),
                "num_attention_heads": text["num_attention_heads"],
                "num_key_value_heads": int(past.shape[1]),
                "num_hidden_layers": text["num_hidden_layers"],
                "session_options": _SESSION,
                "inputs": {
                    "inputs_embeds": "inputs_embeds", "attention_mask": "attention_mask",
                    "position_ids": "position_ids", "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": length, "num_beams": 1, "past_present_share_buffer": False},
    }  # fmt: skip


def _image_settings(run: Run) -> dict[str, Any]:
    """What the folder says of pictures; InputError without it."""
    for name in (_PREPROCESSOR, _PROCESSOR):
        path = run.companions / name
        settings = sealed.read_json(path) if path.is_file() else {}
        settings = settings.get("image_processor", settings if name == _PREPROCESSOR else {})
        if settings:
            return dict(settings)
    raise InputError(
        "the model's folder does not say how pictures are prepared",
        where=run.companions,
        expected=_PREPROCESSOR,
        next_step="copy it into the base's folder and repeat the run",
    )


def _preparation(run: Run) -> dict[str, Any]:
    """The operations that make pixel_values of a picture, as onnxruntime-extensions has them."""
    settings, vision = _image_settings(run), run.config["vision_config"]
    kind = str(run.config["model_type"])
    normal: dict[str, Any] = {"mean": settings["image_mean"], "std": settings["image_std"]}
    if kind == "gemma3":
        size = settings.get("size") or {"height": vision["image_size"], "width": vision["image_size"]}
        resize: dict[str, Any] = {"height": size["height"], "width": size["width"], "keep_aspect_ratio": 0}
        last = ("Permute3D", {"dims": [2, 0, 1]})
    else:
        size = settings.get("size") or {}
        least = settings.get("min_pixels") or size["shortest_edge"]
        most = settings.get("max_pixels") or size["longest_edge"]
        cells = {"patch_size": vision["patch_size"], "merge_size": vision["spatial_merge_size"]}
        resize = {"width": 540, "height": 360, "smart_resize": 1, "min_pixels": least, "max_pixels": most, **cells}
        last = ("PatchImage", {**cells, "temporal_patch_size": vision["temporal_patch_size"]})
        normal[kind] = 1  # the order of the axes that the patches are cut from
    steps: tuple[tuple[str, dict[str, Any]], ...] = (
        ("DecodeImage", {"color_space": "RGB"}), ("ConvertRGB", {}), ("Resize", resize),
        ("Rescale", {"rescale_factor": settings.get("rescale_factor", 1 / 255)}), ("Normalize", normal), last,
    )  # fmt: skip
    operations = [{"operation": {"name": f"step_{i}", "type": t, "attrs": a}} for i, (t, a) in enumerate(steps)]
    return {"processor": {"name": f"{kind}_image_processor", "transforms": operations}}
