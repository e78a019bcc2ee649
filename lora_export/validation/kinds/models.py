"""The kinds of models. Exactly one kind matches a model; a new one is an entry of KINDS and its two functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_export.errors import InputError
from lora_export.validation.comparing import lengths
from lora_export.validation.comparing.comparison import SOME, Comparison
from lora_export.validation.comparing.decoder import (
    GREEDY_TOKENS,
    TOKENS_WITHOUT_CACHE,
    DecoderComparison,
    has_cache,
)
from lora_export.validation.comparing.encoder import EncoderComparison
from lora_export.validation.comparing.seq2seq import Seq2SeqComparison
from lora_export.validation.comparing.tested_model import ModelUnderTest, generates, is_pair, setting, takes
from lora_export.validation.comparing.texts import MAX_TOKENS, windows
from lora_export.validation.comparing.vision_language import VisionLanguageComparison
from lora_export.validation.kinds.sights import PREFIX, sights
from lora_export.validation.kinds.signals import images, pixels, sounds
from lora_export.validation.kinds.texts import Texts, boxes, padded, positions, token_lists, vocabulary

STEPS = 32  # tokens that an encoder-decoder generates, if it has so many positions


@dataclass(frozen=True)
class ComparedKind:
    """title: for a person; matches: whether a transformers model is of this kind; comparison: how it is compared,
    and on what."""

    name: str
    title: str
    matches: Callable[[Any], bool]
    comparison: Callable[[ModelUnderTest], Comparison[Any, Any]]


def choose(model: Any) -> ComparedKind:
    """The kind of a transformers model; InputError where none or several match."""
    matching = [k for k in KINDS if k.matches(model)]
    if len(matching) != 1:
        several = f" ({' and '.join(k.title for k in matching)})" if matching else ""
        raise InputError(
            f"{type(model).__name__} is {'of several kinds' if matching else 'of no kind'} that validation knows"
            f"{several}; its inputs are {', '.join(sorted(takes(model)))}",
            expected="exactly one of: " + "; ".join(k.title for k in KINDS),
            next_step="validate the models it consists of, or open an issue for this architecture",
        )
    return matching[0]


# --- text in, text out -------------------------------------------------------------------------------------------


def _continues(model: Any) -> bool:
    return generates(model) and not model.config.is_encoder_decoder and "input_ids" in takes(model)


def _sees(model: Any) -> bool:
    return hasattr(model, "get_image_features") and "pixel_values" in takes(model)


def _is_decoder(model: Any) -> bool:
    return _continues(model) and not _sees(model)


def _decoder(subject: ModelUnderTest) -> DecoderComparison:
    texts = token_lists(subject, room=GREEDY_TOKENS)
    return DecoderComparison(**_continued(subject, texts, [*texts.tokens, *texts.long]), note=texts.note)


def _is_vision_language(model: Any) -> bool:
    return _continues(model) and _sees(model) and model.config.model_type not in PREFIX


def _vision_language(subject: ModelUnderTest) -> VisionLanguageComparison:
    texts = token_lists(subject, room=GREEDY_TOKENS)
    pictures, note = sights(subject)
    given = _continued(subject, texts, pictures.put_into([*texts.tokens, *texts.long]))
    given["text"] = pictures.removed_from(given["text"])
    return VisionLanguageComparison(**given, pictures=pictures, note=_joined(texts.note, note))


def _continued(subject: ModelUnderTest, texts: Texts, tokens: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a comparison of texts that are continued is built with. tokens: ids (length,) of each."""
    pieces: list[torch.Tensor] = []
    if not texts.random:  # without a tokenizer there is no running text
        longest, words = positions(subject.model, 0), vocabulary(subject.model)
        pieces = windows(texts.tokenizer, subject.text, words, subject.options.text, longest)
    known = lengths.most_positions(subject.model)
    room = GREEDY_TOKENS if known is None else known - max(map(len, tokens[:SOME]))
    steps = max(1, min(GREEDY_TOKENS if has_cache(subject.model) else TOKENS_WITHOUT_CACHE, room))
    return {"tokens": tokens, "tokenizer": texts.tokenizer, "text": pieces, "steps": steps, **subject.common}


def _is_seq2seq(model: Any) -> bool:
    return generates(model) and bool(model.config.is_encoder_decoder)


def _seq2seq(subject: ModelUnderTest) -> Seq2SeqComparison:
    """The decoder is given the next text's tokens: it need not agree with them to be compared on them."""
    texts, config = token_lists(subject), subject.model.config
    batches, note = _encoder_batches(subject, texts)
    known = setting(config, "max_target_positions", "max_position_embeddings", "max_decoder_position_embeddings")
    most = min(known or 2 * STEPS, lengths.most_positions(subject.model) or MAX_TOKENS)
    rows = sum(len(next(iter(b.values()))) for b in batches)
    start = torch.tensor([int(setting(config, "decoder_start_token_id", "bos_token_id", "pad_token_id") or 0)])
    pool = texts.tokens + texts.long if "input_ids" in takes(subject.model) else texts.long + texts.tokens
    tokens = [torch.cat([start, pool[(i + 1) % len(pool)]])[:most] for i in range(rows)]
    given = {"tokens": tokens, "tokenizer": texts.tokenizer, "batches": batches, "steps": min(STEPS, most - 1)}
    return Seq2SeqComparison(**given, **subject.common, note=_joined(texts.note, note))


def _encoder_batches(subject: ModelUnderTest, texts: Texts) -> tuple[list[dict[str, torch.Tensor]], str]:
    """What the encoder gets: a prompt alone, the others padded, longer texts alone; or sounds, or images."""
    names = takes(subject.model)
    if "input_ids" in names:
        pad = setting(subject.model.config, "pad_token_id") or 0
        single = [[ids] for ids in texts.long]
        batches = [padded(some, pad) for some in (texts.tokens[:1], texts.tokens[1:], *single) if some]
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in batches], ""
    if "pixel_values" in names:
        return images(subject)
    waves, note = sounds(subject)
    return ([row for batch in waves for row in _alone(batch)] if "input_values" in names else waves), note


def _alone(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Waves one by one, without padding: not every encoder of waves takes a mask, and none needs it for one."""
    waves = batch["input_values"]
    mask = batch.get("attention_mask", torch.ones(waves.shape[:2]))
    return [{"input_values": wave[None, : int(n)]} for wave, n in zip(waves, mask.sum(1), strict=True)]


# --- something else out: hidden states, a pooled embedding, classes, spans --------------------------------------


def _encodes(model: Any) -> bool:
    return not generates(model) and not is_pair(model)


def _is_text(model: Any) -> bool:
    return _encodes(model) and "input_ids" in takes(model)


def _is_vision(model: Any) -> bool:
    return _encodes(model) and "pixel_values" in takes(model) and "input_ids" not in takes(model)


def _is_audio(model: Any) -> bool:
    hears = bool(takes(model) & {"input_values", "input_features"})
    return _encodes(model) and hears and not takes(model) & {"input_ids", "pixel_values"}


def _text(subject: ModelUnderTest) -> EncoderComparison:
    """Each prompt and each longer text alone, then all prompts in one padded batch where the model takes a mask."""
    model = subject.model
    texts = token_lists(subject)
    batches = [_text_inputs(model, ids[None], None) for ids in (*texts.tokens, *texts.long)]
    pad = setting(model.config, "pad_token_id")
    if "attention_mask" in takes(model) and pad is not None and len(texts.tokens) > 1:
        batches.append(_text_inputs(model, *padded(texts.tokens, pad)))
    return _encoder(subject, batches, texts.note)


def _text_inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    if type(model).__name__.endswith("ForMultipleChoice"):  # (batch, choices, length): the texts are the choices
        ids, mask = ids[None], None if mask is None else mask[None]
    inputs: dict[str, Any] = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    if "bbox" in takes(model):
        inputs["bbox"] = boxes(model.config, ids.shape)
        if "pixel_values" in takes(model):  # the page that the words and boxes are from
            inputs |= pixels(model.config, len(ids))
    if "use_cache" in takes(model):
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder and "decoder_input_ids" in takes(model):
        inputs["decoder_input_ids"] = ids
    return inputs


def _vision(subject: ModelUnderTest) -> EncoderComparison:
    return _encoder(subject, *images(subject))


def _audio(subject: ModelUnderTest) -> EncoderComparison:
    return _encoder(subject, *sounds(subject))


def _is_pair(model: Any) -> bool:
    return not generates(model) and is_pair(model)


def _pair(subject: ModelUnderTest) -> EncoderComparison:
    """All texts in one padded batch against each batch of the other side."""
    texts = token_lists(subject)
    others, note = images(subject) if "pixel_values" in takes(subject.model) else sounds(subject)
    pad = setting(subject.model.config.get_text_config(), "pad_token_id") or 0
    ids, mask = padded([*texts.tokens, *texts.long], pad)
    words = {"input_ids": ids} | ({"attention_mask": mask} if "attention_mask" in takes(subject.model) else {})
    return _encoder(subject, [words | other for other in others], _joined(texts.note, note))


def _encoder(subject: ModelUnderTest, batches: Sequence[Mapping[str, Any]], note: str) -> EncoderComparison:
    return EncoderComparison(batches=batches, **subject.common, note=note)


def _joined(*notes: str) -> str:
    return "; ".join(n for n in notes if n)


KINDS = (
    ComparedKind("decoder", "decoder (Llama, GPT-2, …)", _is_decoder, _decoder),
    ComparedKind(
        "vision-language",
        "vision-language (Qwen2.5-VL, Gemma 3, LLaVA, SmolVLM, …)",
        _is_vision_language,
        _vision_language,
    ),
    ComparedKind("seq2seq", "encoder-decoder (T5, BART, Marian, Whisper, …)", _is_seq2seq, _seq2seq),
    ComparedKind(
        "text",
        "text encoder or text with a head (BERT, DeBERTa, T5's encoder, …)",
        _is_text,
        _text,
    ),
    ComparedKind("vision", "vision (ViT, CLIP's vision tower, ResNet, VideoMAE, …)", _is_vision, _vision),
    ComparedKind("audio", "audio (wav2vec 2, HuBERT, Whisper's encoder, …)", _is_audio, _audio),
    ComparedKind("pair", "text and image, or text and sound, compared (CLIP, SigLIP, CLAP)", _is_pair, _pair),
)
