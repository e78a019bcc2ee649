"""Models that hear, and those that speak."""

from tests.export_matrix.models import Row

_WAVES = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}

ROWS = (
    Row("Wav2Vec2ForCTC", _WAVES),
    Row("HubertForCTC", _WAVES),
    Row("WavLMForCTC", _WAVES),
    Row("Wav2Vec2BertForCTC", {"vocab_size": 101}),
    Row("Wav2Vec2ForSequenceClassification", _WAVES),
    Row("WhisperForAudioClassification"),
    Row("SpeechT5ForTextToSpeech"),
    Row("VitsModel"),
)
