"""report.json is written whole, and read back with distrust."""

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lora_export.contracts.report import SCHEMA_VERSION
from lora_export.errors import InputError
from lora_export.report import files, load, render
from lora_export.report.plots import by_layer
from tests.report.conftest import read, write

Samples = dict[str, dict[str, tuple[float, ...]]]


def test_report_round_trips(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    write(full, tmp_path, timings)
    names = ["conditions.json", "report.html", "report.json", "report.md", "samples.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert load(tmp_path) == read(full) and files.to_json(load(tmp_path)) == full
    assert len(json.loads((tmp_path / "samples.json").read_text())["b1/p128/decode"]["base_again"]) == 176


def test_report_command_restores_pages(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    write(full, tmp_path, timings)
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").write_text("gone")
    (tmp_path / "report.md").unlink()
    render(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert (tmp_path / "report.md").is_file()


def test_report_missing_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report found") as caught:
        render(tmp_path)
    assert caught.value.next_step


def break_json(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def change(**changes: Any) -> Any:
    def breaking(path: Path) -> None:
        report = json.loads(path.read_text())
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            place = report
            for parent in parents:
                place = place[int(parent)] if parent.isdigit() else place[parent]
            key = int(last) if last.isdigit() else last
            if value is ...:
                del place[key]
            else:
                place[key] = value
        path.write_text(json.dumps(report))

    return breaking


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (break_json, "not valid JSON"),
        (lambda path: path.write_text("[]"), "does not hold a JSON object"),
        (change(schema_version=SCHEMA_VERSION + 1), "schema version"),
        (change(schema_version=...), "schema version"),
        (change(title=...), "has no field 'title'"),
        (change(status="perhaps"), "status is wrong: .*perhaps"),
        (change(merge=[]), "merge is an array"),
        (change(merge__records__0__name=3), r"merge.records\[0\].*name is an integer"),
        (change(validate__checks__2__passed="yes"), r"validate.checks\[2\].*passed is a string"),
        (change(benchmark__cells__1__merged_ms=None), r"benchmark.cells\[1\].*merged_ms"),
        (change(benchmark__cells__0__ratio=True), "ratio is a boolean"),
        (change(benchmark__cells__0=7), r"benchmark.cells\[0\] is an integer"),
    ],
)
def test_report_damaged_is_refused_and_pages_stay(
    breaking: Any, message: str, full: dict[str, Any], tmp_path: Path
) -> None:
    kept = tmp_path / "report.html"
    kept.write_text("as it was")
    (tmp_path / "report.json").write_text(json.dumps(full))
    breaking(tmp_path / "report.json")
    with pytest.raises(InputError, match=message) as caught:
        render(tmp_path)
    assert str(tmp_path / "report.json") == caught.value.where
    assert kept.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name, "report.json"]


SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "report.schema.json"
BROKEN = [
    change(schema_version=SCHEMA_VERSION + 1), change(title=...), change(status="perhaps"), change(merge=[]),
    change(merge__records__0__name=3), change(validate__checks__2__passed="yes"), change(validate__checks__0=...),
    change(benchmark__cells__1__merged_ms=None), change(benchmark__cells__0__arms__base__p50=3),
    change(merge=None), change(benchmark=None), change(export__files={"a": 1}), change(export__files={"a": "b"}),
    change(more=1),
]  # fmt: skip


@pytest.mark.parametrize("breaking", BROKEN)
def test_report_schema_agrees_with_reader(breaking: Any, full: dict[str, Any], tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    (tmp_path / "report.json").write_text(json.dumps(full))
    assert validator.is_valid(json.loads((tmp_path / "report.json").read_text()))
    breaking(tmp_path / "report.json")
    try:
        load(tmp_path)
        taken = True
    except InputError:
        taken = False
    assert validator.is_valid(json.loads((tmp_path / "report.json").read_text())) == taken


def test_report_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))


@pytest.mark.parametrize("samples", [{"b1": 3}, {"b1": {"base": ["1"]}}, {"b1": {"base": 1.0}}])
def test_samples_damaged_are_refused(samples: Any, full: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(full))
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    with pytest.raises(InputError, match="samples is damaged: "):
        render(tmp_path)


def test_samples_may_be_missing(full: dict[str, Any], timings: Samples, tmp_path: Path) -> None:
    write(full, tmp_path, timings)
    (tmp_path / "samples.json").unlink()
    render(tmp_path)
    assert (tmp_path / "report.html").read_text().count("<figure>") == 4


def test_layer_names_group_experts() -> None:
    means = by_layer(
        [
            ("model.layers.7.self_attn.q_proj.weight", 0.2),
            ("model.layers.7.mlp.experts.0.w1.weight", 0.1),
            ("model.layers.7.mlp.experts.1.w1.weight", 0.3),
            ("model.layers.7.norm.weight", None),
            ("lm_head.weight", 0.5),
        ]
    )
    assert means == {(7, "q_proj"): 0.2, (7, "w1"): pytest.approx(0.2)}


def test_report_of_large_model_is_drawn_quickly(full: dict[str, Any], tmp_path: Path) -> None:
    record = full["merge"]["records"][0]
    names = [f"model.layers.{i}.self_attn.p{j}.weight" for i in range(126) for j in range(30)]
    full["merge"]["records"] = [record | {"name": name} for name in names]
    started = time.process_time()
    write(full, tmp_path)
    assert time.process_time() - started < 30
    assert (tmp_path / "report.html").stat().st_size < 4 * 2**20
