"""Sound in, no text out: wav2vec 2, HuBERT, WavLM, Whisper's encoder or classifier, …"""

from typing import Any

from lora_export.validation.comparing.encoder import EncoderStory
from lora_export.validation.comparing.subject import Story, Subject, generates, is_pair, takes
from lora_export.validation.kinds.signals import sounds
from lora_export.validation.kinds.texts import Noted

NAME = "audio (wav2vec 2, HuBERT, Whisper's encoder, …)"


def matches(model: Any) -> bool:
    inputs = takes(model)
    hears = bool(inputs & {"input_values", "input_features"})
    return not generates(model) and not is_pair(model) and hears and not inputs & {"input_ids", "pixel_values"}


def story(subject: Subject) -> Story:
    batches, note = sounds(subject)
    return Noted(EncoderStory(batches, subject.dtypes, subject.progress, factor=subject.factor), note)
