"""Models with one forward beyond the matrix: other ways to be built, fed and answered."""

from tests.export_matrix.comparing import Shapes
from tests.export_matrix.models import Row
from tests.export_matrix.vision import DETR

_STAGES = {
    "depths": [2, 2], "num_heads": [2, 2], "embed_dim": 12, "window_size": 2, "image_size": 32,
    "out_features": ["stage2"], "out_indices": [2],
}  # fmt: skip
_WAVES = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
_VIDEO = {"num_frames": 4, "image_size": 16, "patch_size": 8, "tubelet_size": 2}

ROWS = (
    Row("ElectraForSequenceClassification"),
    Row("RobertaPreLayerNormForTokenClassification"),
    Row("LayoutLMForTokenClassification"),
    Row("LiltForTokenClassification"),
    Row("MobileBertForSequenceClassification"),
    Row("SqueezeBertForSequenceClassification"),
    Row("RemBertForTokenClassification"),
    Row("NystromformerForSequenceClassification"),
    Row("ConvBertForTokenClassification"),
    Row("Data2VecTextForTokenClassification"),
    Row("RoFormerForSequenceClassification"),
    Row("FunnelForTokenClassification"),
    Row("IBertForSequenceClassification"),
    Row("T5ForSequenceClassification", {"decoder_start_token_id": 0, "eos_token_id": 2}),
    Row("BartForQuestionAnswering"),
    Row("SwinForImageClassification", _STAGES),
    Row("SwinForImageClassification", {**_STAGES, "window_size": 4}, variant="one window"),
    Row("Swinv2ForImageClassification", {**_STAGES, "pretrained_window_sizes": [0, 0]}),
    Row("DeiTForImageClassification"),
    Row("ResNetForImageClassification"),
    Row("MobileViTForSemanticSegmentation", {"image_size": 64}),
    Row("GLPNForDepthEstimation"),
    Row("CLIPSegModel"),
    Row("OwlViTForObjectDetection"),
    Row("MaskFormerForInstanceSegmentation"),
    Row("ConditionalDetrForObjectDetection", DETR),
    Row("VideoMAEForVideoClassification", _VIDEO),
    Row("TimesformerForVideoClassification", _VIDEO),
    Row("ASTForAudioClassification", {"max_length": 96, "num_mel_bins": 32, "patch_size": 16}),
    Row("SEWForCTC", {**_WAVES, "conv_dim": [16] * 13}),
    Row("UniSpeechSatForSequenceClassification", _WAVES),
    Row("Data2VecAudioForCTC", _WAVES),
    Row("Wav2Vec2ConformerForCTC", {**_WAVES, "vocab_size": 101}),
    Row("Wav2Vec2ForXVector", {**_WAVES, "tdnn_dim": [16] * 5}, Shapes(sounds=(16_000, 19_000, 21_300))),
)
