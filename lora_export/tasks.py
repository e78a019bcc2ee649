"""Tasks by the names that transformers' pipelines have, and the class of a base for each."""

from collections.abc import Mapping
from typing import Any

MOST_LABELS = 100_000  # a shape is a few bytes of a file, and every label is named in config.json

# Task → the tables of transformers that give a configuration its class for it.
TASKS: Mapping[str, tuple[str, ...]] = {
    "text-classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",),
    "token-classification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",),
    "question-answering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING",),
    "multiple-choice": ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING",),
    "image-classification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",),
    "image-segmentation": ("MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING",),
    "video-classification": ("MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",),
    "audio-classification": ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",),
    "audio-frame-classification": ("MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING",),
    "audio-xvector": ("MODEL_FOR_AUDIO_XVECTOR_MAPPING",),
    "automatic-speech-recognition": ("MODEL_FOR_CTC_MAPPING", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
    "text-generation": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "text2text-generation": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",),
    "fill-mask": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "feature-extraction": ("MODEL_MAPPING",),
}
# PEFT's task_type → the task.
PEFT_TASKS: Mapping[str, str] = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def classes_of(task: str, config: Any) -> list[Any]:
    """The transformers classes for a task and a transformers configuration; none where there is no such class."""
    import transformers

    classes: list[Any] = []
    for table in TASKS[task]:
        try:
            entry = getattr(transformers, table).get(type(config), ())
        except ImportError:  # a class whose library is not installed
            continue
        classes += entry if isinstance(entry, tuple | list) else [entry]
    return classes


def class_named(name: object) -> Any:
    """The transformers class of this name, None if there is none."""
    import transformers

    value = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return value if isinstance(value, type) and issubclass(value, transformers.PreTrainedModel) else None


def with_labels(config: Mapping[str, Any], count: int, names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """The keys of a config.json that give a model so many labels. names: LABEL_i where there are none."""
    called = [(names or {}).get(i, f"LABEL_{i}") for i in range(count)]
    changes: dict[str, Any] = {
        "id2label": {str(i): name for i, name in enumerate(called)},
        "label2id": {name: i for i, name in enumerate(called)},
    }
    return changes | {key: count for key in ("num_labels", "_num_labels") if key in config}
