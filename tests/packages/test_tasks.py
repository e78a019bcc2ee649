"""What a package says of a task: the classes of Optimum and transformers.js, and what a sample is."""

import pytest

from lora_export.onnx_export.engines import export_tasks
from lora_export.packages.job import PackageFacts
from lora_export.packages.targets import target_named
from lora_export.packages.tasks import task_of


@pytest.mark.parametrize(
    ("architecture", "optimum", "javascript", "reads"),
    [
        ("BertForMultipleChoice", "ORTModelForMultipleChoice", "AutoModel", "text"),
        (
            "SegformerForSemanticSegmentation", "ORTModelForSemanticSegmentation",
            "AutoModelForSemanticSegmentation", "image",
        ),
        (
            "MaskFormerForInstanceSegmentation", "ORTModelForCustomTasks",
            "AutoModelForUniversalSegmentation", "image",
        ),
        ("DetrForObjectDetection", "ORTModelForCustomTasks", "AutoModelForObjectDetection", "image"),
        ("DPTForDepthEstimation", "ORTModelForCustomTasks", "AutoModelForDepthEstimation", "image"),
        ("OwlViTForObjectDetection", "ORTModelForCustomTasks", "AutoModelForZeroShotObjectDetection", "both"),
        ("CLIPModel", "ORTModelForZeroShotImageClassification", "AutoModel", "both"),
        ("VideoMAEForVideoClassification", "ORTModelForCustomTasks", "AutoModel", "video"),
        ("Swin2SRForImageSuperResolution", "ORTModelForImageToImage", "AutoModelForImageToImage", "image"),
        ("Wav2Vec2ForXVector", "ORTModelForAudioXVector", "AutoModelForXVector", "audio"),
    ],
)  # fmt: skip
def test_package_task_of_an_exported_class(architecture: str, optimum: str, javascript: str, reads: str) -> None:
    name = export_tasks.task_of(architecture)
    assert name is not None
    task = task_of(name, architecture)
    assert (task.optimum, task.js, task.input) == (optimum, javascript, reads)


@pytest.mark.parametrize(
    ("words", "begun"),
    [
        (51_864, "<|startoftranscript|><|notimestamps|>"),
        (51_865, "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"),
        (51_866, "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"),
    ],
)
def test_package_genai_program_begins_as_whisper_was_trained(words: int, begun: str) -> None:
    """English models have no language and no task in their prompts; all others have both."""
    target = target_named("genai")
    task = task_of("automatic-speech-recognition", "WhisperForConditionalGeneration")
    facts = PackageFacts(target, "n", task, "fp32", ("run",), ("cpu",), None, {"vocab_size": words})
    assert f"processor([{begun!r}], audios=audios)" in target.snippet(facts, ".").code
    assert ("<|de|>" in target.notes(facts)) == ("<|en|>" in begun)
