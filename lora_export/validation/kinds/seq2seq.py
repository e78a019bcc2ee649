"""Encoder-decoders: text or sound in, text out."""

from typing import Any

import torch

from lora_export.validation.comparing import lengths
from lora_export.validation.comparing.prompts import MAX_TOKENS
from lora_export.validation.comparing.seq2seq import Seq2SeqStory
from lora_export.validation.comparing.subject import Story, Subject, generates, setting, takes
from lora_export.validation.kinds.signals import images, sounds
from lora_export.validation.kinds.texts import Noted, Texts, padded, token_lists

NAME = "encoder-decoder (T5, BART, Marian, Whisper, …)"
STEPS = 32  # tokens that are generated, if the decoder has so many positions


def matches(model: Any) -> bool:
    return generates(model) and bool(model.config.is_encoder_decoder)


def story(subject: Subject) -> Story:
    """The decoder is given the next text's tokens: it need not agree with them to be compared on them."""
    texts = token_lists(subject)
    batches, note = _encoder_batches(subject, texts)
    config = subject.model.config
    known = setting(config, "max_target_positions", "max_position_embeddings", "max_decoder_position_embeddings")
    positions = min(known or 2 * STEPS, lengths.most_positions(subject.model) or MAX_TOKENS)
    rows = sum(len(next(iter(b.values()))) for b in batches)
    start = torch.tensor([_start(config)])
    pool = texts.tokens + texts.long if "input_ids" in takes(subject.model) else texts.long + texts.tokens
    given = [pool[(i + 1) % len(pool)] for i in range(rows)]
    tokens = [torch.cat([start, ids])[:positions] for ids in given]
    told = "; ".join(n for n in (texts.note, note) if n)
    steps = min(STEPS, positions - 1)
    story = Seq2SeqStory(batches, tokens, steps, texts.tokenizer, subject.dtypes, subject.progress, subject.factor)
    return Noted(story, told)


def _encoder_batches(subject: Subject, texts: Texts) -> tuple[list[dict[str, torch.Tensor]], str]:
    """What the encoder gets: a prompt alone, the others padded, longer texts alone; or sounds, or images."""
    names = takes(subject.model)
    if "input_ids" in names:
        pad = setting(subject.model.config, "pad_token_id") or 0
        single = [[ids] for ids in texts.long]
        batches = [padded(some, pad) for some in (texts.tokens[:1], texts.tokens[1:], *single) if some]
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches], ""
    return images(subject) if "pixel_values" in names else sounds(subject)


def _start(config: Any) -> int:
    """The token that a decoder begins with."""
    found = setting(config, "decoder_start_token_id", "bos_token_id", "pad_token_id")
    return int(found or 0)
