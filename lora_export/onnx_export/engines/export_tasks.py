"""What a model is exported for, by Optimum's names of tasks: what transformers itself says of its class."""

import functools
from collections.abc import Mapping

# transformers' tables of classes, and the task of the classes in each; the first that names a class decides.
_TABLES: Mapping[str, str] = {
    "FOR_SEQUENCE_CLASSIFICATION": "text-classification",
    "FOR_TOKEN_CLASSIFICATION": "token-classification",
    "FOR_QUESTION_ANSWERING": "question-answering",
    "FOR_MULTIPLE_CHOICE": "multiple-choice",
    "FOR_MASKED_LM": "fill-mask",
    "FOR_CAUSAL_LM": "text-generation",
    "FOR_SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",
    "FOR_SPEECH_SEQ_2_SEQ": "automatic-speech-recognition",
    "FOR_CTC": "automatic-speech-recognition",
    "FOR_AUDIO_CLASSIFICATION": "audio-classification",
    "FOR_AUDIO_FRAME_CLASSIFICATION": "audio-frame-classification",
    "FOR_AUDIO_XVECTOR": "audio-xvector",
    "FOR_TEXT_TO_SPECTROGRAM": "text-to-audio",
    "FOR_TEXT_TO_WAVEFORM": "text-to-audio",
    "FOR_IMAGE_CLASSIFICATION": "image-classification",
    "FOR_OBJECT_DETECTION": "object-detection",
    "FOR_SEMANTIC_SEGMENTATION": "semantic-segmentation",
    "FOR_INSTANCE_SEGMENTATION": "image-segmentation",
    "FOR_UNIVERSAL_SEGMENTATION": "image-segmentation",
    "FOR_IMAGE_SEGMENTATION": "image-segmentation",
    "FOR_DEPTH_ESTIMATION": "depth-estimation",
    "FOR_VIDEO_CLASSIFICATION": "video-classification",
    "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION": "zero-shot-image-classification",
    "FOR_ZERO_SHOT_OBJECT_DETECTION": "zero-shot-object-detection",
    "FOR_IMAGE_TEXT_TO_TEXT": "image-text-to-text",
    "FOR_DOCUMENT_QUESTION_ANSWERING": "document-question-answering",
    "FOR_VISUAL_QUESTION_ANSWERING": "visual-question-answering",
    "FOR_MASKED_IMAGE_MODELING": "masked-im",
    "FOR_IMAGE_TO_IMAGE": "image-to-image",
    "FOR_KEYPOINT_DETECTION": "keypoint-detection",
    "FOR_TEXT_ENCODING": "feature-extraction",
    "": "feature-extraction",
}
# Towers of models with two, which no table has.
_PROJECTIONS = ("TextModel", "VisionModel", "TextModelWithProjection", "VisionModelWithProjection")


@functools.cache
def body_of(model_type: str) -> str | None:
    """The class of a model's body, as sentence-transformers loads it: of an encoder-decoder its encoder."""
    from transformers.models.auto import modeling_auto

    encoders = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(model_type)
    bodies = encoders or modeling_auto.MODEL_MAPPING_NAMES.get(model_type)
    name = bodies if isinstance(bodies, str) or bodies is None else bodies[0]
    return None if name is None else str(name)


@functools.cache
def task_of(architecture: str) -> str | None:
    """The task of a class of transformers; None for a class that transformers has no task for."""
    from transformers.models.auto import modeling_auto

    for table, task in _TABLES.items():
        name = f"MODEL_{table}_MAPPING_NAMES" if table else "MODEL_MAPPING_NAMES"
        for classes in getattr(modeling_auto, name).values():
            if architecture in ((classes,) if isinstance(classes, str) else classes):
                return task
    import transformers

    tower = architecture.endswith(_PROJECTIONS) and isinstance(getattr(transformers, architecture, None), type)
    return "feature-extraction" if tower else None
