"""Two towers whose embeddings are compared: CLIP, SigLIP, CLAP."""

from typing import Any

from lora_export.validation.comparing.encoder import EncoderStory
from lora_export.validation.comparing.subject import Story, Subject, generates, is_pair, setting, takes
from lora_export.validation.kinds.signals import images, sounds
from lora_export.validation.kinds.texts import Noted, padded, token_lists

NAME = "text and image, or text and sound, compared (CLIP, SigLIP, CLAP)"


def matches(model: Any) -> bool:
    return not generates(model) and is_pair(model)


def story(subject: Subject) -> Story:
    """All texts in one padded batch against each batch of the other side."""
    texts = token_lists(subject)
    others, note = images(subject) if "pixel_values" in takes(subject.model) else sounds(subject)
    pad = setting(subject.model.config.get_text_config(), "pad_token_id") or 0
    ids, mask = padded([*texts.tokens, *texts.long], pad)
    words = {"input_ids": ids} | ({"attention_mask": mask} if "attention_mask" in takes(subject.model) else {})
    batches = [words | other for other in others]
    notes = "; ".join(n for n in (texts.note, note) if n)
    return Noted(EncoderStory(batches, subject.dtypes, subject.progress, factor=subject.factor), notes)
