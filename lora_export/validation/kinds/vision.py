"""Images or video in: ViT, ResNet, CLIP's vision tower, VideoMAE, …"""

from typing import Any

from lora_export.validation.comparing.encoder import EncoderStory
from lora_export.validation.comparing.subject import Story, Subject, generates, is_pair, takes
from lora_export.validation.kinds.signals import images
from lora_export.validation.kinds.texts import Noted

NAME = "vision (ViT, CLIP's vision tower, ResNet, VideoMAE, …)"


def matches(model: Any) -> bool:
    inputs = takes(model)
    return not generates(model) and not is_pair(model) and "pixel_values" in inputs and "input_ids" not in inputs


def story(subject: Subject) -> Story:
    batches, note = images(subject)
    return Noted(EncoderStory(batches, subject.dtypes, subject.progress, factor=subject.factor), note)
