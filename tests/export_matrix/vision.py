"""Models that see, and those that compare pictures with texts."""

from transformers import ConvNextConfig, Dinov2Config, ResNetConfig, RTDetrResNetConfig

from tests.export_matrix.models import Row

_STAGES = {"hidden_sizes": [12, 16, 20, 24], "depths": [1, 1, 1, 1]}
_RESNET = ResNetConfig(
    embedding_size=8,
    hidden_sizes=[12, 16, 20, 24],
    depths=[1, 1, 1, 1],
    out_features=["stage1", "stage2", "stage3", "stage4"],
)
_CONVNEXT = ConvNextConfig(**_STAGES, out_features=["stage1", "stage2", "stage3", "stage4"])
_RT_RESNET = RTDetrResNetConfig(
    embedding_size=12, **_STAGES, layer_type="basic", out_features=["stage2", "stage3", "stage4"]
)
_DINO = Dinov2Config(
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
    out_features=["stage1", "stage2", "stage3", "stage4"],
    reshape_hidden_states=False,
    apply_layernorm=True,
)
DETR = {"backbone_config": _RESNET, "num_queries": 7, "decoder_layers": 2, "encoder_layers": 2}

ROWS = (
    Row("SiglipForImageClassification"),
    Row("ConvNextForImageClassification", {"image_size": 64}),
    Row("DINOv3ViTModel"),
    Row("CLIPModel"),
    Row("SiglipModel"),
    Row("CLIPTextModelWithProjection"),
    Row("CLIPVisionModelWithProjection"),
    Row("ViTForImageClassification"),
    Row("Dinov2ForImageClassification"),
    Row("BeitForImageClassification"),
    Row("YolosForObjectDetection", {"image_size": [48, 64], "patch_size": 8, "num_detection_tokens": 7}),
    Row("DetrForObjectDetection", DETR),
    Row(
        "RTDetrForObjectDetection",
        {
            "backbone_config": _RT_RESNET,
            "encoder_hidden_dim": 48,
            "encoder_in_channels": [16, 20, 24],
            "decoder_in_channels": [48, 48, 48],
            "num_queries": 7,
        },
    ),
    Row(
        "SegformerForSemanticSegmentation",
        {**_STAGES, "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 32},
    ),
    Row("UperNetForSemanticSegmentation", {"backbone_config": _CONVNEXT, "hidden_size": 48}),
    Row(
        "DPTForDepthEstimation",
        {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [12, 16, 20, 24]},
    ),
    Row(
        "DepthAnythingForDepthEstimation",
        {"backbone_config": _DINO, "neck_hidden_sizes": [12, 16, 20, 24], "reassemble_hidden_size": 48}
        | {"patch_size": 14},
    ),
)
