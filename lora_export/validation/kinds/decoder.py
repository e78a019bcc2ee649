"""Decoders: text in, logits of the next token out."""

from typing import Any

from lora_export.validation.decoder_story import DecoderStory
from lora_export.validation.decoders import GREEDY_TOKENS
from lora_export.validation.kinds.texts import Noted, token_lists, vocabulary
from lora_export.validation.subject import Story, Subject, generates, takes
from lora_export.validation.text import windows

NAME = "decoder (Llama, GPT-2, …)"


def matches(model: Any) -> bool:
    return generates(model) and not model.config.is_encoder_decoder and "input_ids" in takes(model)


def story(subject: Subject) -> Story:
    texts = token_lists(subject, room=GREEDY_TOKENS)
    pieces = (
        [] if texts.note else windows(texts.tokenizer, subject.text, vocabulary(subject.model), subject.text_file)
    )
    story = DecoderStory(texts.tokens, texts.tokenizer, subject.dtypes, subject.progress, subject.factor, pieces)
    return Noted(story, texts.note)
