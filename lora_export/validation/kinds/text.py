"""Text in, something other than the next token out: hidden states, a pooled embedding, classes, spans."""

from typing import Any

import torch

from lora_export.validation.comparing.encoder import EncoderStory
from lora_export.validation.comparing.subject import Story, Subject, generates, is_pair, setting, takes
from lora_export.validation.kinds.texts import Noted, padded, token_lists

NAME = "text encoder or text with a head (BERT, RoBERTa, ModernBERT, DeBERTa, T5's encoder, …)"


def matches(model: Any) -> bool:
    return not generates(model) and not is_pair(model) and "input_ids" in takes(model)


def story(subject: Subject) -> Story:
    """Each prompt and each longer text alone, then all prompts in one padded batch where the model takes a mask."""
    model = subject.model
    texts = token_lists(subject)
    batches = [_inputs(model, ids[None], None) for ids in (*texts.tokens, *texts.long)]
    pad = setting(model.config, "pad_token_id")
    if "attention_mask" in takes(model) and pad is not None and len(texts.tokens) > 1:
        batches.append(_inputs(model, *padded(texts.tokens, pad)))
    story = EncoderStory(batches, subject.dtypes, subject.progress, subject.factor)
    return Noted(story, texts.note)


def _inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    if type(model).__name__.endswith("ForMultipleChoice"):  # (batch, choices, length): the texts are the choices
        ids, mask = ids[None], None if mask is None else mask[None]
    inputs: dict[str, Any] = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    if "use_cache" in takes(model):
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes(model):
        inputs["decoder_input_ids"] = ids
    return inputs
