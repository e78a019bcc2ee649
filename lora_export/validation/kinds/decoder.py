"""Decoders: text in, logits of the next token out."""

from typing import Any

import torch

from lora_export.validation.comparing import lengths
from lora_export.validation.comparing.decoder import SAMPLES, DecoderStory
from lora_export.validation.comparing.decoders import GREEDY_TOKENS, TOKENS_WITHOUT_CACHE, has_cache
from lora_export.validation.comparing.subject import Story, Subject, generates, takes
from lora_export.validation.comparing.text import windows
from lora_export.validation.kinds.texts import Noted, Texts, positions, token_lists, vocabulary

NAME = "decoder (Llama, GPT-2, …)"


def matches(model: Any) -> bool:
    return generates(model) and not model.config.is_encoder_decoder and "input_ids" in takes(model)


def story(subject: Subject) -> Story:
    texts = token_lists(subject, room=GREEDY_TOKENS)
    pieces = _pieces(subject, texts)
    tokens = [*texts.tokens, *texts.long]
    known = lengths.most_positions(subject.model)
    room = GREEDY_TOKENS if known is None else known - max(map(len, tokens[:SAMPLES]))
    steps = max(1, min(GREEDY_TOKENS if has_cache(subject.model) else TOKENS_WITHOUT_CACHE, room))
    story = DecoderStory(tokens, texts.tokenizer, subject.dtypes, subject.progress, subject.factor, pieces, steps)
    return Noted(story, texts.note)


def _pieces(subject: Subject, texts: Texts) -> list[torch.Tensor]:
    """The running text in pieces that the model has positions for; none without a tokenizer."""
    if texts.random:
        return []
    longest = positions(subject.model, 0)
    return windows(texts.tokenizer, subject.text, vocabulary(subject.model), subject.text_file, longest)
