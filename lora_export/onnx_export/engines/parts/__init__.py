"""What is traced of a model: one part per graph file, with Optimum's names of files, inputs and outputs."""

from typing import Any

from lora_export.onnx_export.engines.parts import decoder, multimodal, sentence, seq2seq, single, traceable
from lora_export.onnx_export.engines.parts.graph_part import NotTraceable, Traced


def parts_of(model: Any, task: str) -> Traced:
    """The graphs of a model, depending on what it takes and whether it generates. task: Optimum's name of it.

    Raises NotTraceable for a model that cannot be a graph.
    """
    if task == "text-to-audio" and model.can_generate():
        raise NotTraceable(
            f"{type(model).__name__} makes speech in a loop of its own, with random numbers in each step: its "
            "answers to the same text differ, and no graph can be compared with it"
        )
    traceable.prepare(model)
    generates = model.can_generate() and not type(model).__name__.endswith("ForCTC")  # which decodes in `generate`
    if model.config.is_encoder_decoder and generates:
        return Traced("seq2seq", f"{seq2seq.task(model, task)}-with-past", seq2seq.parts(model))
    if multimodal.sees(model):
        return Traced("vision-language", f"{task}-with-past", multimodal.parts(model))
    if generates:
        return Traced("decoder", f"{task}-with-past", (decoder.part(model),))
    return Traced("encoder", task, (sentence.pooled(single.part(model, task), model),))
