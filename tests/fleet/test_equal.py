"""A row that shares its base leaves the bytes that the command alone does, and its checks have the same figures."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, Source, StoryOptions
from lora_export.pipeline import merge_and_export
from lora_export.progress import Silent
from tests.builders import bert_config, lora, randomize
from tests.end_to_end.conftest import prepared
from tests.fleet.making import carry_out, node, options, planned, with_short_texts
from tests.validation.conftest import save_adapter, save_base, save_tokenizer

pytestmark = pytest.mark.slow


def decoder(folder: Path) -> tuple[Path, list[Path]]:
    base = save_base(folder / "base", torch.float32)
    return base, [save_adapter(base, folder / f"adapter-{i}", seed=1 + i) for i in range(2)]


def encoder(folder: Path) -> tuple[Path, list[Path]]:
    base = folder / "base"
    model = transformers.BertForSequenceClassification(bert_config())
    randomize(model, 1)
    model.save_pretrained(base)
    save_tokenizer(base)
    adapters = []
    for i in range(2):
        loaded = transformers.BertForSequenceClassification.from_pretrained(base)
        tuned = peft.get_peft_model(loaded, lora(target_modules=["query", "value"]))
        randomize(tuned, 5 + i, ("lora_B",), 0.2)
        tuned.save_pretrained(folder / f"adapter-{i}")
        adapters.append(folder / f"adapter-{i}")
    return base, adapters


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_equal(row: Path, alone: Path) -> None:
    """merged/ and onnx/ by their bytes; of export.json all but the seconds and whose proof it is."""
    one, two = files(row / "merged"), files(alone / "merged")
    assert one.keys() == two.keys() and [n for n in one if one[n] != two[n]] == []
    one, two = files(row / "onnx"), files(alone / "onnx")
    assert one.keys() == two.keys() and [n for n in one if one[n] != two[n]] in ([], ["export.json"])
    records = [json.loads(each["export.json"]) for each in (one, two)]
    for record in records:
        del record["seconds"], record["proof"]["seconds"]
    assert records[0] == records[1]


def figures(run: Path) -> dict[str, Any]:
    """What a validation found, without words: names of checks → values, and what else has numbers."""
    found = json.loads((run / "report" / "report.json").read_text())["validate"]
    return {n: v for n, v in found.items() if n not in ("advice",)}


def compared(base: Path, adapters: list[Path], how: StoryOptions, folder: Path) -> None:
    """The second adapter as a row of a base that was prepared with the first, and as the command does it."""
    root = folder / "ROOT"
    with node(folder / "scratch") as scratch:
        assert carry_out("base", planned(base, adapters[0], how), root, scratch).state == "done"
        one = planned(base, adapters[1], how)
        assert one.base_key, one.alone
        row = carry_out("row", one, root, scratch)
        assert row.state == "done", row.error
    seed = json.loads((root / row.place / "report" / "report.json").read_text())["validate"]["seed"]
    same = replace(how, validation=replace(how.validation, seed=seed))
    alone = folder / "alone"
    merge_and_export(Source(str(base), base), [AdapterChoice(adapters[1])], alone, same, Silent())
    assert_equal(root / row.place, alone)
    assert figures(root / row.place) == figures(alone)
    shutil.rmtree(folder / "scratch")


@pytest.mark.parametrize(
    ("make", "precision"),
    [(decoder, "fp32"), (decoder, "int4"), (encoder, "fp32")],
    ids=["fp32", "int4", "encoder"],
)
def test_row_of_a_shared_base_has_the_bytes_of_the_command(
    make: Callable[[Path], tuple[Path, list[Path]]], precision: str, tmp_path: Path
) -> None:
    how = with_short_texts(options(precision), tmp_path)
    if precision == "int4":  # a random model loses more than a real one, which is not what this is about
        how = replace(how, validation=replace(how.validation, min_survival=0.0))
    compared(*make(tmp_path), how, tmp_path)


def test_row_of_smollm2_has_the_bytes_of_the_command(tmp_path: Path) -> None:
    base = prepared("prepare_smollm2.py")
    adapters = [Path(__file__).parents[2] / "examples" / "adapters" / "lora-speeches", tmp_path / "weaker"]
    shutil.copytree(adapters[0], adapters[1])
    weights = load_file(adapters[0] / "adapter_model.safetensors")
    weaker = {name: w * 0.9 if "lora_B" in name else w for name, w in weights.items()}
    save_file(weaker, adapters[1] / "adapter_model.safetensors", metadata={"format": "pt"})
    compared(base, adapters, with_short_texts(options("int4"), tmp_path), tmp_path)
