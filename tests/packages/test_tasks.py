"""What a package says of a task: the classes of Optimum and transformers.js, and what a sample is."""

import pytest

from lora_export.onnx_export.engines import export_tasks
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
