"""What models do, by Optimum's names of tasks, and the classes of the runtimes that do it."""

from dataclasses import dataclass
from typing import Literal

from lora_export.errors import ExportError


@dataclass(frozen=True)
class PackageTask:
    """name: Optimum's; auto: the class of transformers; input: what the model reads; generates: whether the model
    generates text token by token; hub: the Hub's name, where it is another; own: whether Optimum has a class for
    the task; javascript: the class of transformers.js, where it is another; draws: whether it is a pipeline of
    several models that makes pictures."""

    name: str
    auto: str
    input: Literal["text", "image", "audio", "video", "both"] = "text"
    generates: bool = False
    hub: str = ""
    own: bool = True
    javascript: str = ""
    draws: bool = False

    @property
    def sees_and_writes(self) -> bool:
        """Whether it continues a text with pictures among its tokens."""
        return self.input == "both" and self.generates

    @property
    def pipeline(self) -> str:
        """The Hub's name of the task."""
        return self.hub or self.name

    @property
    def optimum(self) -> str:
        """The class of Optimum; the one for every single graph where it has none for the task."""
        if not self.own:
            return "ORTModelForCustomTasks"
        return f"ORT{self.auto.removeprefix('Auto')}" + "ForFeatureExtraction" * (self.auto == "AutoModel")

    @property
    def js(self) -> str:
        """The class of transformers.js; its AutoModel gives the outputs of any graph by their names."""
        return self.javascript or self.auto


_ALL = (
    PackageTask("text-generation", "AutoModelForCausalLM", generates=True),
    PackageTask("text2text-generation", "AutoModelForSeq2SeqLM", generates=True, hub="translation"),
    PackageTask("image-to-text", "AutoModelForVision2Seq", "image", generates=True),
    PackageTask("feature-extraction", "AutoModel"),
    PackageTask("fill-mask", "AutoModelForMaskedLM"),
    PackageTask("text-classification", "AutoModelForSequenceClassification"),
    PackageTask("token-classification", "AutoModelForTokenClassification"),
    PackageTask("question-answering", "AutoModelForQuestionAnswering"),
    PackageTask("image-classification", "AutoModelForImageClassification", "image"),
    PackageTask("audio-classification", "AutoModelForAudioClassification", "audio"),
    PackageTask("image-text-to-text", "AutoModelForImageTextToText", "both", generates=True, own=False),
    PackageTask(
        "zero-shot-image-classification", "AutoModelForZeroShotImageClassification", "both", javascript="AutoModel"
    ),
    PackageTask("multiple-choice", "AutoModelForMultipleChoice", javascript="AutoModel"),
    PackageTask("semantic-segmentation", "AutoModelForSemanticSegmentation", "image", hub="image-segmentation"),
    PackageTask("image-segmentation", "AutoModelForUniversalSegmentation", "image", own=False),
    PackageTask("object-detection", "AutoModelForObjectDetection", "image", own=False),
    PackageTask("depth-estimation", "AutoModelForDepthEstimation", "image", own=False),
    PackageTask("zero-shot-object-detection", "AutoModelForZeroShotObjectDetection", "both", own=False),
    PackageTask(
        "video-classification", "AutoModelForVideoClassification", "video", own=False, javascript="AutoModel"
    ),
    PackageTask("image-to-image", "AutoModelForImageToImage", "image"),
    PackageTask("text-to-image", "DiffusionPipeline", draws=True),
    PackageTask("masked-im", "AutoModelForMaskedImageModeling", "image", own=False, javascript="AutoModel"),
    PackageTask("audio-frame-classification", "AutoModelForAudioFrameClassification", "audio"),
    PackageTask("audio-xvector", "AutoModelForAudioXVector", "audio", javascript="AutoModelForXVector"),
)
_ASR = "automatic-speech-recognition"
_CTC = PackageTask(_ASR, "AutoModelForCTC", "audio")
_SPEECH = PackageTask(_ASR, "AutoModelForSpeechSeq2Seq", "audio", True)


def task_of(name: str, architecture: str) -> PackageTask:
    """The task that an export names ("text-generation-with-past"). ExportError for one that no package supports."""
    plain = name.removesuffix("-with-past")
    if plain == _ASR:
        return _CTC if architecture.endswith("ForCTC") else _SPEECH
    for task in _ALL:
        if task.name == plain:
            return task
    raise ExportError(f"the export is for the task {name!r}", expected=", ".join(t.name for t in _ALL))
