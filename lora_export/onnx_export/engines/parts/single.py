"""Models that do not generate: one forward, one graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_export.onnx_export.engines.parts import forward_inputs, probing
from lora_export.onnx_export.engines.parts.graph_part import Axes, GraphPart

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
    forward, returned = probing.first_accepted(model, forward_inputs.calls(model, task))
    names = list(forward.inputs)
    outputs = {name: _axes(forward, name) for name in _outputs(type(model).__name__, task, returned)}

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = forward(model, dict(zip(names, values, strict=True)))
        return tuple(result[name] for name in outputs)

    return GraphPart("model.onnx", "model.onnx_data", run, forward.inputs, outputs)


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


def _axes(forward: probing.Forward, output: str) -> Axes:
    """Names of axes that the exporter would give a formula."""
    if "input_values" in forward.inputs and output in ("logits", "last_hidden_state"):
        return {}
    return {}
