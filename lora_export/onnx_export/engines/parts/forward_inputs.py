"""The inputs of a model with one forward: from its signature, the folder's processors, and the configuration."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_export.onnx_export.engines.parts.graph_part import BATCH, LENGTH, Input, takes
from lora_export.onnx_export.engines.parts.probing import Forward

CHOICES = 4
SAMPLES = 16_000  # of a sound: a second
FRAMES = 104  # of a spectrum
_STRIDE = 32  # of most networks of convolutions: pictures of other sizes are padded, or refused
_PICTURE = 224  # where neither the configuration nor the processor says a size
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "bbox")
_SIGNALS = ("pixel_values", "input_values", "input_features")


def calls(model: Any, task: str) -> list[Forward]:
    """Ways to call the model, the most dynamic first: which of them it takes is found by trying.

    Two towers may have a batch each, or several texts a picture; pictures and spectra have any size, or the one of
    the configuration; an encoder-decoder makes its decoder's ids, or is given them.
    """
    seen = _Seen(model, task)
    towers = (True, False) if takes(model, "input_ids") and seen.signals else (False,)
    own = takes(model, "decoder_input_ids") and "input_ids" in seen.names
    decoder = ((True, False) if task == "feature-extraction" else (False, True)) if own else (False,)
    found = []
    for (signal, fixed), apart, given in itertools.product(seen.pictures_and_sounds(), towers, decoder):
        text = seen.text(*(("text_batch_size", 2 * BATCH) if apart else ("batch_size", BATCH)))
        if apart:
            signal = {n: _batch_axis(i, "image_batch_size") for n, i in signal.items()}
        if given:
            axes = {0: "batch_size", 1: "decoder_sequence_length"}
            text["decoder_input_ids"] = ((BATCH, LENGTH), torch.int64, axes)
        more = {"use_cache": False} if takes(model, "use_cache") else {}
        found.append(Forward(_ordered(model, text | signal), fixed | more))
    return found


def usual_pictures(model: Any) -> tuple[tuple[int, int], ...]:
    """Heights and widths of pictures that a model gets: by its configuration, by its processor, and twice that."""
    native, processed = _Seen(model, "").native_size(), _processed_size(Path(str(model.name_or_path)))
    sizes = {size for size in (native, processed) if size} or {(_PICTURE, _PICTURE)}
    return tuple(sorted(sizes | {(2 * height, 2 * width) for height, width in sizes}))


def _ordered(model: Any, inputs: dict[str, Input]) -> dict[str, Input]:
    """By their places in Optimum's graphs: text before pictures, but the ids of two towers before everything."""
    order = ("input_ids", "pixel_values", "input_features", "attention_mask")
    return dict(sorted(inputs.items(), key=lambda i: order.index(i[0]) if i[0] in order else len(order)))


def _batch_axis(value: Input, name: str) -> Input:
    shape, dtype, axes = value
    return shape, dtype, {**axes, 0: name}


class _Seen:
    """What is known of a model's inputs before it runs."""

    def __init__(self, model: Any, task: str) -> None:
        self._model, self._task, self._config = model, task, model.config
        self._folder = Path(str(model.name_or_path))
        self._made = _made_by_processors(self._folder)
        self.names = {name for name in (*_TEXT, *_SIGNALS) if takes(model, name)}
        self.signals = self.names - set(_TEXT)

    def text(self, batch: str, rows: int) -> dict[str, Input]:
        if "input_ids" not in self.names:
            return {}
        choices = (CHOICES,) if self._task == "multiple-choice" else ()
        axes = {0: batch, **({1: "num_choices"} if choices else {}), 1 + len(choices): "sequence_length"}
        ids: Input = ((rows, *choices, LENGTH), torch.int64, axes)
        found = {"input_ids": ids}
        if "attention_mask" in self.names and self._makes("attention_mask"):
            found["attention_mask"] = ids
        if "token_type_ids" in self.names and self._setting("type_vocab_size", 0) > 1 and self._types_tokens():
            found["token_type_ids"] = ids
        if "bbox" in self.names:
            found["bbox"] = ((*ids[0], 4), torch.int64, axes)
        return found

    def pictures_and_sounds(self) -> Iterator[tuple[dict[str, Input], dict[str, Any]]]:
        """(inputs, fixed arguments), the most dynamic first."""
        if "pixel_values" in self.names:
            yield from self._pictures()
        elif "input_values" in self.names and not self._setting("num_mel_bins", 0):
            yield self._wave(), {}
        elif self.signals:
            yield from self._spectra()
        else:
            yield {}, {}

    # --- pictures ------------------------------------------------------------------------------------------

    def _pictures(self) -> Iterator[tuple[dict[str, Input], dict[str, Any]]]:
        native, processed = self.native_size(), _processed_size(self._folder)
        unit = math.lcm(_STRIDE, max(_pair(self._setting("patch_size", 1))))
        height, width = (math.ceil(n / unit) * unit for n in native or processed or (_PICTURE, _PICTURE))
        free = self._pixels((height + unit, width + 2 * unit), {"height", "width"})
        yield free, {}
        if processed and native and processed != native and takes(self._model, "interpolate_pos_encoding"):
            yield free, {"interpolate_pos_encoding": True}
        yield self._pixels(native or processed or (_PICTURE, _PICTURE), set()), {}

    def _pixels(self, size: tuple[int, int], free: set[str]) -> dict[str, Input]:
        frames = self._setting("num_frames", 0) if self._task == "video-classification" or self._is_video() else 0
        leading = (BATCH, *((frames,) if frames else ()), self._setting("num_channels", 3))
        axes = {0: "batch_size"}
        if free:
            axes |= {len(leading): "height", len(leading) + 1: "width"}
        found: dict[str, Input] = {"pixel_values": ((*leading, *size), torch.float32, axes)}
        if takes(self._model, "pixel_mask") and self._made and "pixel_mask" in self._made:
            kept = {0: "batch_size", **({1: "height", 2: "width"} if free else {})}
            found["pixel_mask"] = ((BATCH, *size), torch.int64, kept)
        return found

    def _is_video(self) -> bool:
        return bool(self._setting("tubelet_size", 0) or self._setting("num_frames", 0))

    def native_size(self) -> tuple[int, int] | None:
        for name in ("image_size", "input_size"):
            size = self._setting(name, None)
            if isinstance(size, dict):
                size = (size["height"], size["width"])
            if size:
                return _pair(size)
        return None

    # --- sounds --------------------------------------------------------------------------------------------

    def _wave(self) -> dict[str, Input]:
        axes = {0: "batch_size", 1: "sequence_length"}
        found: dict[str, Input] = {"input_values": ((BATCH, SAMPLES), torch.float32, axes)}
        # Feature encoders with group normalization were trained without a mask.
        masked = self._setting("feat_extract_norm", None) == "layer" or self._extractor_masks()
        if takes(self._model, "attention_mask") and masked:
            found["attention_mask"] = ((BATCH, SAMPLES), torch.int64, axes)
        return found

    def _extractor_masks(self) -> bool:
        return bool(_read(self._folder / "preprocessor_config.json").get("return_attention_mask"))

    def _spectra(self) -> Iterator[tuple[dict[str, Input], dict[str, Any]]]:
        name = next(n for n in ("input_features", "input_values") if n in self.names)
        bins = next(
            n
            for key in ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "_default")
            if (n := 80 if key == "_default" else self._setting(key, 0))
        )
        frames = 2 * self._setting("max_source_positions", 0) or self._setting("max_length", 0) or FRAMES
        axes = {0: "batch_size", 1: "sequence_length"}
        free: dict[str, Input] = {name: ((BATCH, FRAMES, bins), torch.float32, axes)}
        if takes(self._model, "attention_mask"):
            free["attention_mask"] = ((BATCH, FRAMES), torch.int64, axes)
        yield free, {}
        yield {name: ((BATCH, bins, FRAMES), torch.float32, {0: "batch_size", 2: "sequence_length"})}, {}
        yield {name: ((BATCH, frames, bins), torch.float32, {0: "batch_size"})}, {}
        yield {name: ((BATCH, bins, frames), torch.float32, {0: "batch_size"})}, {}

    # --- settings ------------------------------------------------------------------------------------------

    def _makes(self, name: str) -> bool:
        """Whether the folder's tokenizer or processor makes an input, or the folder does not say."""
        return not self._made or name in self._made

    def _types_tokens(self) -> bool:
        """Whether the folder's tokenizer makes token_type_ids, or the folder does not say.

        Where it does not, callers have none to give: multilingual-e5 is a BERT with the tokenizer of XLM-R. The
        class that any tokenizer.json can have makes them in transformers 4 alone, so it says nothing.
        """
        import transformers

        settings = _read(self._folder / "tokenizer_config.json")
        cls = str(settings.get("tokenizer_class"))
        own = None if cls == "PreTrainedTokenizerFast" else getattr(transformers, cls, None)
        names = settings.get("model_input_names") or getattr(own, "model_input_names", None)
        return names is None or "token_type_ids" in names

    def _setting(self, name: str, default: Any) -> Any:
        """Of the configuration, or of its part for pictures, sounds or text."""
        parts = ("", "vision_config", "audio_config", "text_config", "backbone_config")
        for part in parts:
            config = getattr(self._config, part, None) if part else self._config
            value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
            if value is not None:
                return value
        return default


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, list | tuple):
        return int(size[-2] if len(size) > 1 else size[0]), int(size[-1])
    return int(size), int(size)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _made_by_processors(folder: Path) -> set[str]:
    """The names of inputs that the folder's tokenizer and processor make; none where it does not say."""
    import transformers

    made: set[str] = set()
    for file, key in (("tokenizer_config.json", ""), ("preprocessor_config.json", "image_processor_type")):
        settings = _read(folder / file)
        cls = getattr(transformers, str(settings.get(key)), None)
        made |= set(settings.get("model_input_names") or getattr(cls, "model_input_names", None) or ())
    return made


def _processed_size(folder: Path) -> tuple[int, int] | None:
    """The size of the pictures that the folder's processor makes, where it is one."""
    settings = _read(folder / "preprocessor_config.json")
    cropped = settings.get("crop_size") if settings.get("do_center_crop", "crop_size" in settings) else None
    size = cropped or settings.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    return None
