"""Models of text that do not generate."""

from tests.export_matrix.models import Row

ROWS = (
    Row("BertForMultipleChoice"),
    Row("BertForSequenceClassification"),
    Row("ModernBertForSequenceClassification"),
    Row("XLMRobertaForSequenceClassification"),
    Row("EsmForSequenceClassification"),
    Row("RobertaForTokenClassification"),
    Row("DebertaV2ForTokenClassification"),
    Row("LayoutLMv3ForTokenClassification", {"coordinate_size": 8, "shape_size": 8}),
    Row("DistilBertForQuestionAnswering"),
    Row("AlbertForQuestionAnswering"),
    Row("BigBirdForQuestionAnswering"),
    Row("CamembertForMaskedLM"),
    Row("EsmForMaskedLM"),
    Row("DebertaForMaskedLM"),
    Row("MPNetModel"),
    Row("XLMRobertaModel"),
    Row("EuroBertModel"),
    Row("T5EncoderModel"),
    Row("BartForSequenceClassification"),
)
