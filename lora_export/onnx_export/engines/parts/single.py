"""Models that do not generate: one forward, one graph."""

from typing import Any

import torch

from lora_export.onnx_export.engines.parts.graph_part import BATCH, LENGTH, Axes, GraphPart, Input, takes


def part(model: Any) -> GraphPart:
    """A model that does not generate: inputs from the signature of forward, outputs as in Optimum."""
    inputs = _inputs(model)
    names = list(inputs)
    outputs = _outputs(model)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        result = model(**given, **({"use_cache": False} if takes(model, "use_cache") else {}))
        return tuple(result[name] for name in outputs)

    return GraphPart("model.onnx", "model.onnx_data", run, inputs, outputs)


def _inputs(model: Any) -> dict[str, Input]:
    config = model.config
    inputs: dict[str, Input] = {}
    ids: Input = ((BATCH, LENGTH), torch.int64, {0: "batch_size", 1: "sequence_length"})
    if takes(model, "input_ids"):
        two_towers = takes(model, "pixel_values")
        axes = {0: "text_batch_size" if two_towers else "batch_size", 1: "sequence_length"}
        inputs["input_ids"] = (ids[0], ids[1], axes)
        if two_towers:
            inputs["pixel_values"] = _pixels(config.vision_config, "image_batch_size")
        inputs["attention_mask"] = (ids[0], ids[1], axes)
        if takes(model, "token_type_ids") and getattr(config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = (ids[0], ids[1], axes)
    elif takes(model, "pixel_values"):
        inputs["pixel_values"] = _pixels(config, "batch_size")
    elif takes(model, "input_values"):
        axes = {0: "batch_size", 1: "sequence_length"}
        inputs["input_values"] = ((BATCH, 16_000), torch.float32, axes)
        if getattr(config, "feat_extract_norm", None) == "layer":  # others were trained without a mask
            inputs["attention_mask"] = ((BATCH, 16_000), torch.int64, axes)
    return inputs


def _pixels(config: Any, batch: str) -> Input:
    size = config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return (BATCH, getattr(config, "num_channels", 3), height, width), torch.float32, {0: batch}


def _outputs(model: Any) -> dict[str, Axes]:
    name, batch = type(model).__name__, {0: "batch_size"}
    per_token = {0: "batch_size", 1: "sequence_length"}
    if takes(model, "pixel_values") and takes(model, "input_ids"):
        return {
            "logits_per_image": {0: "image_batch_size", 1: "text_batch_size"},
            "logits_per_text": {0: "text_batch_size", 1: "image_batch_size"},
            "text_embeds": {0: "text_batch_size"},
            "image_embeds": {0: "image_batch_size"},
        }
    if name.endswith("ForQuestionAnswering"):
        return {"start_logits": per_token, "end_logits": per_token}
    if name.endswith("WithProjection"):
        return {"text_embeds" if takes(model, "input_ids") else "image_embeds": batch}
    if name.endswith(("ForSequenceClassification", "ForImageClassification")):
        return {"logits": batch}
    if takes(model, "input_values"):
        per_token = {0: "batch_size", 1: "encoder_sequence_length"}
    if not name.endswith(("Model", "EncoderModel")):
        return {"logits": per_token}
    return {"last_hidden_state": batch if takes(model, "pixel_values") else per_token}
