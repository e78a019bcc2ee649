"""Models that see, and those that compare pictures with texts."""

from tests.export_matrix.models import Row

ROWS = (
    Row("SiglipForImageClassification"),
    Row("ConvNextForImageClassification"),
    Row("DINOv3ViTModel"),
    Row("CLIPModel"),
    Row("SiglipModel"),
    Row("CLIPTextModelWithProjection"),
    Row("CLIPVisionModelWithProjection"),
    Row("ViTForImageClassification"),
    Row("Dinov2ForImageClassification"),
    Row("BeitForImageClassification"),
    Row("YolosForObjectDetection"),
    Row("DetrForObjectDetection"),
    Row("RTDetrForObjectDetection"),
    Row("SegformerForSemanticSegmentation"),
    Row("UperNetForSemanticSegmentation"),
    Row("DPTForDepthEstimation"),
    Row("DepthAnythingForDepthEstimation"),
)
