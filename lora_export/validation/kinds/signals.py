"""Images and sounds: seeded, and brought to the model by its own processor where the folder ships one."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_export.validation.comparing.tested_model import ModelUnderTest, setting, takes

Batches = list[dict[str, torch.Tensor]]
SEED = 20_240_503
FRAMES = (29, 41, 50)  # lengths of sounds, in steps of the model's feature encoder; 50 are a second of wav2vec 2
IMAGES = (1, 3)  # sizes of the batches
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_RATE = 16_000


def images(subject: ModelUnderTest) -> tuple[Batches, str]:
    """(batches of pixel_values, where they come from)."""
    processed = _processed(subject, _process_images)
    if processed:
        return processed, "on seeded images through the folder's own processor"
    return [pixels(subject.model.config, n) for n in IMAGES], "on seeded random pixels"


def processed_images(subject: ModelUnderTest, counts: Sequence[int]) -> Batches:
    """What the folder's processor makes of so many seeded images at a time; nothing where it makes none."""

    def process(folder: Path) -> Batches:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        generator = torch.Generator().manual_seed(SEED)
        pictures = [torch.randint(256, (3, 160, 200), dtype=torch.uint8, generator=generator) for _ in counts]
        return [dict(processor(images=[pictures[:n]], return_tensors="pt")) for n in counts]

    return _processed(subject, process)


def sounds(subject: ModelUnderTest) -> tuple[Batches, str]:
    """(batches of input_values or input_features, where they come from)."""
    processed = _processed(subject, _process_sounds)
    if processed:
        return processed, "on seeded sounds through the folder's own processor"
    if "input_features" in takes(subject.model):
        return [_features(subject.model.config, n) for n in IMAGES], "on seeded random spectra"
    return _waves(subject.model), "on seeded random waves"


def _processed(subject: ModelUnderTest, process: Callable[[Path], Batches]) -> Batches:
    """What the folder's processor makes of seeded signals, as far as forward takes it; none without a processor.

    A processor may need a library that is not installed here, and random inputs show a fault as well.
    """
    if not any((subject.folder / name).is_file() for name in _PROCESSORS):
        return []
    try:
        made = process(subject.folder)
    except (ImportError, OSError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        subject.progress.warn(f"the model's processor does not work here: {reason}")
        return []
    known = takes(subject.model)
    return [{k: v for k, v in batch.items() if k in known} for batch in made]


def _process_images(folder: Path) -> Batches:
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    generator = torch.Generator().manual_seed(SEED)
    pictures = [torch.randint(256, (3, 160, 200), dtype=torch.uint8, generator=generator) for _ in range(4)]
    return [dict(processor(images=some, return_tensors="pt")) for some in (pictures[:1], pictures[1:])]


def _process_sounds(folder: Path) -> Batches:
    """Sliding tones in noise, of different lengths: one alone, then several with padding."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    rate = int(getattr(extractor, "sampling_rate", _RATE))
    generator = torch.Generator().manual_seed(SEED)
    tones = []
    for seconds in (0.6, 0.9, 1.3):
        time = torch.arange(int(seconds * rate)) / rate
        noise = torch.randn(len(time), generator=generator) * 0.02
        tones.append((0.3 * torch.sin(2 * math.pi * (150 + 300 * time) * time) + noise).numpy())
    some = {"sampling_rate": rate, "return_tensors": "pt"}
    padding = "max_length" if hasattr(extractor, "chunk_length") else True  # Whisper hears thirty seconds, always
    return [dict(extractor(tones[:1], **some)), dict(extractor(tones[1:], padding=padding, **some))]


def pixels(config: Any, batch: int) -> dict[str, torch.Tensor]:
    """Seeded pictures of the size that the configuration says."""
    from optimum.utils import DummyVisionInputGenerator, NormalizedVisionConfig

    vision = getattr(config, "vision_config", None) or config
    stated = "input_size" if isinstance(setting(vision, "input_size"), int) else "image_size"
    normal = NormalizedVisionConfig.with_args(image_size=stated)
    generator = DummyVisionInputGenerator("", normal(vision), batch_size=batch)
    frames = setting(vision, "num_frames")
    with _seeded(batch):
        pictures = [generator.generate("pixel_values") * 2 - 1 for _ in range(frames or 1)]
    return {"pixel_values": torch.stack(pictures, 1) if frames else pictures[0]}


def _features(config: Any, batch: int) -> dict[str, torch.Tensor]:
    """Whisper's encoder wants exactly two frames a position; others take any number of (frames, bins)."""
    from optimum.utils import DummyAudioInputGenerator, NormalizedConfig

    positions = setting(config, "max_source_positions")
    bins = setting(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel") or 80
    frames = 2 * positions if positions else FRAMES[-1]
    generator = DummyAudioInputGenerator(
        "", NormalizedConfig(config), batch_size=batch, feature_size=bins, nb_max_frames=frames
    )
    generator.feature_size = bins  # the generator prefers an attribute that configurations use for other things
    with _seeded(batch):
        features = generator.generate("input_features")
    turned = not setting(config, "num_mel_bins") or not positions
    return {"input_features": features.transpose(1, 2).contiguous() if turned else features}


def _waves(model: Any) -> Batches:
    """Waves one by one, then in a padded batch, with a mask where the model was trained with one."""
    config = model.config
    if setting(config, "max_length") and setting(config, "num_mel_bins"):  # spectrogram transformers
        shape = (config.max_length, config.num_mel_bins)
        generator = torch.Generator().manual_seed(SEED)
        return [{"input_values": torch.randn(n, *shape, generator=generator)} for n in IMAGES]
    strides, kernels = setting(config, "conv_stride") or (320,), setting(config, "conv_kernel") or (400,)
    step = math.prod(strides)
    waves = [_wave(frames * step + sum(kernels) * step // strides[0], frames) for frames in FRAMES]
    batches = [{"input_values": wave[None]} for wave in waves]
    # With group normalization the feature encoder sees its whole input, and was trained without a mask.
    if "attention_mask" in takes(model) and setting(config, "feat_extract_norm") == "layer":
        longest = max(map(len, waves))
        mask = torch.tensor([[1] * len(w) + [0] * (longest - len(w)) for w in waves])
        together = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        batches.append({"input_values": together, "attention_mask": mask})
    return batches


def _wave(samples: int, seed: int) -> torch.Tensor:
    from optimum.utils import DummyAudioInputGenerator, NormalizedConfig

    generator = DummyAudioInputGenerator("", NormalizedConfig(None), batch_size=1, audio_sequence_length=samples)
    with _seeded(seed):
        wave: torch.Tensor = generator.generate("input_values")[0]
    return wave


@contextlib.contextmanager
def _seeded(number: int) -> Iterator[None]:
    """optimum draws from torch's own generator: seeded inside, and left as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + number)
        yield
