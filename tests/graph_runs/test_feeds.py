"""Feeds by name and axis, and which output continues which cache."""

import numpy as np
import pytest

from lora_export.errors import InputError
from lora_export.graph_runs.feeds import Sizes, completed, made_up, token_feeds
from lora_export.graph_runs.signature import GraphValue, Signature

IDS, INT32, FLOAT, HALF = "tensor(int64)", "tensor(int32)", "tensor(float)", "tensor(float16)"
GROWN = "past_sequence_length + sequence_length"
CACHE = ("batch_size", 2, "past_sequence_length", 8)


def signature(inputs: dict[str, tuple[str, tuple[int | str, ...]]], *outputs: str) -> Signature:
    read = {name: GraphValue(name, kind, shape) for name, (kind, shape) in inputs.items()}
    return Signature(read, {name: GraphValue(name, FLOAT, ()) for name in outputs})


DECODER = signature(
    {
        "input_ids": (IDS, ("batch_size", "sequence_length")),
        "attention_mask": (INT32, ("batch_size", GROWN)),
        "position_ids": (IDS, ("batch_size", "sequence_length")),
        "past_key_values.0.key": (HALF, CACHE),
        "past_key_values.1.key": (HALF, CACHE),
    },
    "logits",
    "present.0.key",
    "present.1.key",
)


def test_completed_after_a_cache_counts_its_tokens() -> None:
    feed = completed(DECODER, {"input_ids": np.array([[7, 8]])}, past=3)
    assert feed["attention_mask"].tolist() == [[1] * 5] and feed["attention_mask"].dtype == np.int32
    assert feed["position_ids"].tolist() == [[3, 4]]


def test_token_feeds_have_empty_caches() -> None:
    (feed,) = token_feeds(DECODER, [[7, 8, 9]])
    assert feed["past_key_values.1.key"].shape == (1, 2, 0, 8) and feed["past_key_values.1.key"].dtype == np.float16
    assert feed["position_ids"].tolist() == [[0, 1, 2]]


def test_completed_masks_a_sound_sample_by_sample() -> None:
    wave = ("batch_size", "sequence_length")
    sounds = signature({"input_values": (FLOAT, wave), "attention_mask": (IDS, wave)})
    assert completed(sounds, {"input_values": np.zeros((2, 90))})["attention_mask"].shape == (2, 90)
    made = made_up(sounds.inputs.values(), Sizes(2, 4, 0, 0, 90))
    assert made["input_values"].shape == made["attention_mask"].shape == (2, 90)


def test_completed_refuses_what_does_not_follow() -> None:
    with pytest.raises(InputError, match="pixel_values"):
        completed(signature({"pixel_values": (FLOAT, ("batch_size", 3, 4, 4))}), {"input_ids": np.array([[7]])})


def test_made_up_caches_differ_by_layer_and_not_by_run() -> None:
    sizes = Sizes(2, 7, 3, 9, 0, {"height|width": 6}, vocabulary=5)
    first, second = (made_up(DECODER.inputs.values(), sizes) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)
    caches = [first[f"past_key_values.{i}.key"] for i in range(2)]
    assert caches[0].shape == (2, 2, 3, 8) and (caches[0] != caches[1]).any()
    assert first["attention_mask"].shape == (2, 10) and first["input_ids"].max() < 5


def test_made_up_sizes_follow_from_axes() -> None:
    inputs = signature({
        "pixel_values": (FLOAT, ("batch_size", 3, "height", "width")),
        "encoder_hidden_states": (FLOAT, ("batch_size", "encoder_sequence_length", 8)),
        "encoder_attention_mask": (IDS, ("batch_size", "encoder_sequence_length")),
        "bias": (FLOAT, ("batch_size", GROWN)),
    })  # fmt: skip
    made = made_up(inputs.inputs.values(), Sizes(2, 7, 3, 9, 0, {"height|width": 6}))
    shapes = {name: array.shape for name, array in made.items()}
    assert shapes["pixel_values"] == (2, 3, 6, 6) and shapes["encoder_hidden_states"] == (2, 9, 8)
    assert shapes["encoder_attention_mask"] == (2, 9) and shapes["bias"] == (2, 10)


def test_made_up_choices_boxes_and_pictures_follow_from_axes() -> None:
    choices = ("batch_size", "num_choices", "sequence_length")
    inputs = signature({
        "input_ids": (IDS, choices), "attention_mask": (IDS, choices),
        "bbox": (IDS, ("batch_size", "sequence_length", 4)),
        "pixel_values": (FLOAT, ("batch_size", 3, "height", "width")),
        "pixel_mask": (IDS, ("batch_size", "height", "width")),
    })  # fmt: skip
    made = made_up(inputs.inputs.values(), Sizes(2, 7, 0, 0, 0))
    assert made["input_ids"].shape == made["attention_mask"].shape == (2, 4, 7)
    assert made["pixel_mask"].shape == (2, 224, 224) and made["pixel_values"].shape == (2, 3, 224, 224)
    left, top, right, bottom = np.moveaxis(made["bbox"], -1, 0)
    assert (left <= right).all() and (top <= bottom).all() and (left < right).any()


def test_completed_choices_and_pictures_mask_nothing() -> None:
    choices = ("batch_size", "num_choices", "sequence_length")
    texts = signature(dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (IDS, choices)))
    feed = completed(texts, {"input_ids": np.ones((2, 3, 5), np.int64)})
    assert feed["attention_mask"].shape == feed["token_type_ids"].shape == (2, 3, 5)
    assert feed["attention_mask"].all() and not feed["token_type_ids"].any()
    (given,) = token_feeds(texts, [[7, 8]])
    assert given["input_ids"].tolist() == [[[7, 8], [7, 8]]] and given["attention_mask"].shape == (1, 2, 2)
    page = signature({"input_ids": (IDS, ("b", "s")), "bbox": (IDS, ("b", "s", 4))})
    assert completed(page, {"input_ids": np.ones((2, 5), np.int64)})["bbox"].shape == (2, 5, 4)
    pictures = signature({"pixel_values": (FLOAT, ("b", 3, "h", "w")), "pixel_mask": (IDS, ("b", "h", "w"))})
    feed = completed(pictures, {"pixel_values": np.zeros((2, 3, 8, 9), np.float32)})
    assert feed["pixel_mask"].shape == (2, 8, 9) and feed["pixel_mask"].all()
    spectra = signature({"input_features": (FLOAT, ("b", "s", 80)), "attention_mask": (IDS, ("b", "s"))})
    assert completed(spectra, {"input_features": np.zeros((2, 50, 80))})["attention_mask"].shape == (2, 50)


@pytest.mark.parametrize(
    ("past", "present"),
    [("past_key_values.0.decoder.key", "present.0.decoder.key"), ("past_key_self_0", "present_key_self_0")],
)
def test_cache_is_continued_by_its_own_output(past: str, present: str) -> None:
    read = {"input_ids": (IDS, ()), past: (FLOAT, CACHE)}
    decoder = signature(read, "logits", present)
    assert decoder.cache == {past: present}
    decoder.require_cache()
    with pytest.raises(InputError, match="not a decoder with a KV cache"):
        signature(read, "logits").require_cache()
