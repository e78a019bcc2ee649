"""Rows that no engine exports, and why: what was measured, as the refusal says it."""

from collections.abc import Mapping

REFUSED: Mapping[str, str] = {
    "VitsModel": r"VitsModel .*(random numbers|depends on the values)",
    "SpeechT5ForTextToSpeech": r"SpeechT5ForTextToSpeech makes speech in a loop of its own, with random numbers",
}
