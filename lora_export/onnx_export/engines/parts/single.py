"""Models that do not generate: one forward, one graph."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_export.onnx_export.engines.parts import forward_inputs, probing
from lora_export.onnx_export.engines.parts.graph_part import Axes, GraphPart, NotTraceable

# Outputs by task, by Optimum's names and in its order, as far as the model returns them. A task that is not here
# has everything that the model returns.
_OUTPUTS: Mapping[str, Sequence[str]] = {
    "question-answering": ("start_logits", "end_logits"),
    "zero-shot-image-classification": ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
    "zero-shot-object-detection": ("logits", "pred_boxes", "text_embeds", "image_embeds"),
    "object-detection": ("logits", "pred_boxes"),
    "image-segmentation": ("logits", "pred_masks", "class_queries_logits", "masks_queries_logits"),
    "depth-estimation": ("predicted_depth",),
    "audio-xvector": ("logits", "embeddings"),
    "feature-extraction": ("text_embeds", "image_embeds", "last_hidden_state"),
}
_ENDS = ("ForQuestionAnswering",)
_LOGITS = ("logits",)
# Of transformers' outputs, what is for training, or a step on the way to another output.
_INNER = ("loss", "hidden_states", "attentions", "past_key_values", "auxiliary_outputs")


def part(model: Any, task: str) -> GraphPart:
    """A model that does not generate. Raises NotTraceable for a forward that takes nothing of what is known.

    Its inputs are the most dynamic that its forward takes; its outputs are Optimum's for the task, as far as
    forward returns them.
    """
    calls = forward_inputs.calls(model, task)
    made = _made(model, task, calls)
    fixed = [c for c in calls if not _sizes_pictures(c)]
    if _sizes_pictures(calls[0]) and made.pictures and fixed:
        with contextlib.suppress(NotTraceable):
            return replace(made, fallback=_made(model, task, fixed))
    return made


def _made(model: Any, task: str, calls: Sequence[probing.Forward]) -> GraphPart:
    accepted = probing.first_accepted(model, calls)
    forward = accepted.forward
    names = list(forward.inputs)
    outputs = {n: _axes(accepted, n) for n in _outputs(type(model).__name__, task, accepted.returned)}

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = forward(model, dict(zip(names, values, strict=True)))
        return tuple(result[name] for name in outputs)

    part = GraphPart("model.onnx", "model.onnx_data", run, forward.inputs, outputs)
    if _sizes_pictures(forward):
        return replace(part, pictures=forward_inputs.usual_pictures(model))
    if "input_ids" in forward.inputs:
        return replace(part, longest=int(getattr(model.config, "max_position_embeddings", 0) or 0))
    return part


def _sizes_pictures(forward: probing.Forward) -> bool:
    return any("height" in axes.values() for _, _, axes in forward.inputs.values())


def _outputs(cls: str, task: str, returned: Mapping[str, Any]) -> list[str]:
    """The names of what forward returns that is an output of the graph."""
    wanted = _OUTPUTS.get(task, _LOGITS)
    if cls.endswith(("TextModel", "VisionModel")):  # towers, whose pooled output is what they are for
        wanted = (*wanted, "pooler_output")
    tensors = [n for n, v in returned.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    found = [name for name in wanted if name in tensors]
    if cls.endswith("WithProjection"):
        found = [name for name in found if name != "last_hidden_state"]
    return found or [n for n in tensors if not n.startswith(_INNER) and not n.endswith(_INNER)]


def _axes(accepted: probing.Accepted, output: str) -> Axes:
    """Names of axes that are no inputs': steps of a sound. Others keep what the exporter says."""
    if not accepted.forward.inputs.keys() & {"input_values", "input_features"}:
        return {}
    return {axis: "encoder_sequence_length" for axis in accepted.changing(output) if axis > 0}
