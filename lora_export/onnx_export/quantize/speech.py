"""Sounds with their transcripts, to calibrate encoder-decoders that hear: a folder of NAME.wav and NAME.txt."""

import hashlib
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_export.errors import ExportError, InputError
from lora_export.onnx_export.weights.dtypes import Array
from lora_export.storage import sealed

MOST = 32  # clips
LARGEST = 64 * 2**20  # bytes of a clip: half an hour
_SIXTEEN_BITS = 2


@dataclass(frozen=True)
class Clip:
    """samples: of one channel, from -1 to 1; rate: in Hz."""

    path: Path
    samples: Array
    rate: int
    transcript: str


@dataclass(frozen=True)
class Clips:
    """sha256: of the names and contents of all files that were read."""

    path: Path
    clips: tuple[Clip, ...]
    sha256: str


def read(folder: Path) -> Clips:
    """The clips of a folder, at even distances in the order of their names where there are more than MOST.

    InputError for a folder without clips, a clip without a transcript, and anything but WAV in 16-bit PCM.
    """
    paths = sorted(folder.glob("*.wav"))
    if not paths:
        raise InputError(
            "the folder has no .wav file", where=folder, expected="NAME.wav with NAME.txt, what is said"
        )
    count = min(MOST, len(paths))
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    digest = hashlib.sha256()
    for path in (p for clip in chosen for p in (clip, clip.with_suffix(".txt"))):
        if not path.is_file():
            raise InputError("a clip has no transcript", where=path, expected="a text file with what is said")
        digest.update(f"{path.name}\n{sealed.sha256(path)}\n".encode())
    return Clips(folder, tuple(map(_clip, chosen)), digest.hexdigest())


def _clip(path: Path) -> Clip:
    try:
        transcript = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        with sealed.opened(path) as file, wave.open(file) as sound:
            width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            raw = sound.readframes(LARGEST // max(1, width * channels))
    except (OSError, EOFError, UnicodeDecodeError, wave.Error) as error:
        raise InputError(
            f"the clip cannot be read: {error}", where=path, expected="WAV, and text in UTF-8"
        ) from None
    if width != _SIXTEEN_BITS or not raw or not transcript:
        raise InputError(
            f"{8 * width} bits a sample, {len(raw)} bytes, {len(transcript)} characters of text",
            where=path,
            expected="16-bit PCM with a transcript",
            next_step="ffmpeg -i IN -ar 16000 -ac 1 -c:a pcm_s16le OUT.wav",
        )
    whole = len(raw) // (width * channels) * channels
    samples = np.frombuffer(raw, "<i2", whole).reshape(-1, channels)
    return Clip(path, samples.mean(1, dtype=np.float32) / np.float32(2**15), rate, transcript)


def heard(model: Path, clips: Clips) -> list[Mapping[str, Array]]:
    """What the encoder reads of each clip, by transformers' names, from the feature extractor of a model's folder.

    InputError for a clip at another rate than the extractor's.
    """
    import transformers

    try:
        extractor: Any = transformers.AutoFeatureExtractor.from_pretrained(model, local_files_only=True)
    except Exception as error:  # transformers' errors for a missing file share no base but this one
        raise ExportError(
            f"the model has no feature extractor that can be loaded: {' '.join(str(error).split())[:300]}",
            where=model,
            expected="preprocessor_config.json",
        ) from None
    found: list[Mapping[str, Array]] = []
    for clip in clips.clips:
        if clip.rate != extractor.sampling_rate:
            raise InputError(
                f"{clip.rate} samples a second",
                where=clip.path,
                expected=f"{extractor.sampling_rate}, as the model hears",
                next_step=f"ffmpeg -i IN -ar {extractor.sampling_rate} -ac 1 -c:a pcm_s16le OUT.wav",
            )
        found.append(dict(extractor(clip.samples, sampling_rate=clip.rate, return_tensors="np")))
    return found
