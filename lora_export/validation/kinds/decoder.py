"""Decoders: text in, logits of the next token out."""

from typing import Any

from lora_export.validation.decoder_story import DecoderStory
from lora_export.validation.decoders import GREEDY_TOKENS
from lora_export.validation.kinds.texts import Noted, token_lists
from lora_export.validation.subject import Story, Subject, generates, takes

NAME = "decoder (Llama, GPT-2, …)"


def matches(model: Any) -> bool:
    return generates(model) and not model.config.is_encoder_decoder and "input_ids" in takes(model)


def story(subject: Subject) -> Story:
    texts = token_lists(subject, room=GREEDY_TOKENS)
    return Noted(DecoderStory(texts.tokens, texts.tokenizer, subject.dtypes, subject.progress), texts.note)
