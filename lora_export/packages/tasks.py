"""What models do, by Optimum's names of tasks, and what the runtimes call the classes that do it."""

from dataclasses import dataclass
from typing import Literal

from lora_export.errors import ExportError


@dataclass(frozen=True)
class PackageTask:
    """name: Optimum's; auto: the class of transformers and transformers.js; optimum: its class; input: what the
    model reads; pipeline: the hub's name; generates: whether the model makes text token by token."""

    name: str
    auto: str
    optimum: str
    input: Literal["text", "image", "audio", "both"]
    pipeline: str
    generates: bool = False


_ALL = (
    PackageTask("text-generation", "AutoModelForCausalLM", "ORTModelForCausalLM", "text", "text-generation", True),
    PackageTask(
        "text2text-generation", "AutoModelForSeq2SeqLM", "ORTModelForSeq2SeqLM", "text", "translation", True
    ),
    PackageTask("feature-extraction", "AutoModel", "ORTModelForFeatureExtraction", "text", "feature-extraction"),
    PackageTask("fill-mask", "AutoModelForMaskedLM", "ORTModelForMaskedLM", "text", "fill-mask"),
    PackageTask(
        "text-classification", "AutoModelForSequenceClassification", "ORTModelForSequenceClassification", "text",
        "text-classification",
    ),
    PackageTask(
        "token-classification", "AutoModelForTokenClassification", "ORTModelForTokenClassification", "text",
        "token-classification",
    ),
    PackageTask(
        "question-answering", "AutoModelForQuestionAnswering", "ORTModelForQuestionAnswering", "text",
        "question-answering",
    ),
    PackageTask(
        "image-classification", "AutoModelForImageClassification", "ORTModelForImageClassification", "image",
        "image-classification",
    ),
    PackageTask(
        "audio-classification", "AutoModelForAudioClassification", "ORTModelForAudioClassification", "audio",
        "audio-classification",
    ),
    PackageTask(
        "zero-shot-image-classification", "AutoModelForZeroShotImageClassification",
        "ORTModelForZeroShotImageClassification", "both", "zero-shot-image-classification",
    ),
)  # fmt: skip
_ASR = "automatic-speech-recognition"
_CTC = PackageTask(_ASR, "AutoModelForCTC", "ORTModelForCTC", "audio", _ASR)
_SPEECH = PackageTask(_ASR, "AutoModelForSpeechSeq2Seq", "ORTModelForSpeechSeq2Seq", "audio", _ASR, True)


def task_of(name: str, architecture: str) -> PackageTask:
    """The task that an export names ("text-generation-with-past"). ExportError for one that no package knows."""
    plain = name.removesuffix("-with-past")
    if plain == _ASR:
        return _CTC if architecture.endswith("ForCTC") else _SPEECH
    found = next((t for t in _ALL if t.name == plain), None)
    if found is None:
        raise ExportError(f"the export is for the task {name!r}", expected=", ".join(t.name for t in _ALL))
    return found
