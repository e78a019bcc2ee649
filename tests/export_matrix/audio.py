"""Models that hear, and those that speak."""

from tests.export_matrix.models import Row

ROWS = (
    Row("Wav2Vec2ForCTC"),
    Row("HubertForCTC"),
    Row("WavLMForCTC"),
    Row("Wav2Vec2BertForCTC"),
    Row("Wav2Vec2ForSequenceClassification"),
    Row("WhisperForAudioClassification"),
    Row("SpeechT5ForTextToSpeech"),
    Row("VitsModel"),
)
