"""The plan of a fleet: keys, states from the store, refusals by headers, shared bases, shards, what it imports."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.contracts import FleetOptions, FleetRow, MergeOptions, PlannedRow, StoryOptions
from lora_export.contracts.fleet import Record, RowOutcome, State
from lora_export.errors import InputError
from lora_export.fleet.stores.protocol import Store, opened
from lora_export.progress import Silent
from lora_export.workflows.fleet import needs, planning
from lora_export.workflows.fleet.planning import disk_at_once, in_shard, plan, shard_of, to_do
from tests.builders import edit_json, handmade_adapter, llama_config, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("plan") / "base", config=llama_config(num_hidden_layers=1))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return opened(str(tmp_path / "root"))


def adapter(folder: Path, number: float = 1.0) -> Path:
    module = "model.layers.0.self_attn.q_proj"
    return handmade_adapter(folder, {module: (torch.full((6, 48), number), torch.ones(48, 6))})


def rows(base: Path, *adapters: Path, **more: Any) -> list[FleetRow]:
    return [FleetRow(a.name, "b", str(base), (str(a),), **more) for a in adapters]


def planned(rows: list[FleetRow], store: Store, tmp_path: Path, **options: Any) -> dict[str, PlannedRow]:
    found = plan(rows, store, FleetOptions(**options), Silent(), cache=tmp_path / "hashes.sqlite")
    return {p.row.name: p for p in found}


def put(store: Store, place: str, key: str, state: State, tmp_path: Path) -> None:
    folder = tmp_path / f"put-{place}-{key[:8]}"
    folder.mkdir()
    (folder / "x").write_text("x")
    outcome = RowOutcome("x", key, state, error={"found": "told before"} if state != "done" else None)
    assert store.publish(folder, f"{place}/{key}", Record(1, key, {}, outcome, {}))


# --- rows ----------------------------------------------------------------------------------------------------


def test_plan_of_sound_rows_shares_their_base_and_knows_their_needs(
    base: Path, store: Store, tmp_path: Path
) -> None:
    several = rows(base, *(adapter(tmp_path / name, n) for n, name in enumerate("abc", 1)))
    found = planned(several, store, tmp_path)
    assert [p.row for p in found.values()] == several
    assert len({p.key for p in found.values()}) == 3 and len({p.base_key for p in found.values()}) == 1
    weights = (base / "model.safetensors").stat().st_size
    for one in found.values():
        assert (one.state, one.alone, one.error) == (None, "", None) and len(one.base_key) == 64
        assert one.output_bytes > 1.9 * weights and one.nbytes > 4 * weights
    assert disk_at_once(found.values(), FleetOptions(workers=2)) == 2 * found["a"].nbytes


def test_plan_row_that_headers_refuse_stops_no_other(base: Path, store: Store, tmp_path: Path) -> None:
    names = ("fine", "pickled", "damaged", "code", "empty", "gone")
    places = {name: adapter(tmp_path / name) if name != "gone" else tmp_path / name for name in names}
    (places["pickled"] / "adapter_model.safetensors").rename(places["pickled"] / "adapter_model.bin")
    (places["damaged"] / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    edit_json(places["code"] / "adapter_config.json", auto_map={"AutoModel": "x.Y"})
    for path in places["empty"].iterdir():
        path.unlink()
    found = planned(rows(base, *places.values()), store, tmp_path)
    told = {name: (p.state, (p.error or {}).get("found") or "") for name, p in found.items()}
    assert told["fine"] == (None, "")
    for name, words in (("pickled", "pickled"), ("damaged", "header claims"), ("code", "auto_map"),
                        ("empty", "empty"), ("gone", "no such folder")):  # fmt: skip
        assert told[name][0] == "refused" and words in told[name][1], told
        assert name in str((found[name].error or {})["where"])
    assert to_do(found.values()) == [found["fine"]]


def test_plan_two_of_one_form_are_refused_each_by_its_own_file(base: Path, store: Store, tmp_path: Path) -> None:
    places = [adapter(tmp_path / name, n) for n, name in enumerate(("one", "two"))]
    for place in places:
        (place / "value_head.bin").touch()
    found = planned(rows(base, *places), store, tmp_path)
    assert [p.state for p in found.values()] == ["refused", "refused"]
    assert [Path(str((p.error or {})["where"])).parent for p in found.values()] == places


def test_plan_faulty_base_or_options_refuse_their_rows_alone(base: Path, store: Store, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    options = StoryOptions()
    fp8 = replace(options, export=replace(options.export, precision="fp8"))
    text = replace(options, validation=replace(options.validation, text=tmp_path / "none.txt"))
    package = FleetRow("hf", "b", str(base), (str(one),), replace(options, merged_folder=False), target="hf")
    several = [
        FleetRow("fine", "b", str(base), (str(one),)),
        FleetRow("base", "b", str(broken), (str(one),)),
        FleetRow("hub", "b", "no/such-model", (str(one),)),
        FleetRow("fp8", "b", str(base), (str(one),), fp8),
        FleetRow("text", "b", str(base), (str(one),), text),
        package,
    ]
    found = planned(several, store, tmp_path)
    assert {n: p.state for n, p in found.items()} == {"fine": None} | dict.fromkeys(
        ("base", "hub", "fp8", "text", "hf"), "refused"
    )


def test_plan_row_that_cannot_share_says_why(base: Path, store: Store, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 2)
    options = StoryOptions()
    gptq = replace(options.export, precision="int4")
    gptq = replace(gptq, quantization=replace(gptq.quantization, algorithm="gptq"))
    several = [
        FleetRow("shared", "b", str(base), (str(one),)),
        FleetRow("gptq", "b", str(base), (str(one),), replace(options, export=gptq)),
        FleetRow("both", "b", str(base), (str(one), f"{two}:0.5")),
    ]
    found = planned(several, store, tmp_path)
    assert found["shared"].base_key and not found["shared"].alone
    assert "gptq" in found["gptq"].alone and "2 adapters" in found["both"].alone
    assert not found["gptq"].base_key and found["both"].state is None


@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16"])
def test_needs_are_those_of_the_plan_of_a_merge(dtype: Any, tmp_path: Path) -> None:
    from lora_export.merging import plan as plan_merge

    folder = save_base(tmp_path / "half", config=llama_config(num_hidden_layers=1), dtype=torch.float16)
    (folder / "tokenizer.json").write_text("x" * 500)
    options = MergeOptions(dtype=dtype)
    found, planned = needs.weights_of(folder, options), plan_merge(folder, [], options)
    header = planned.nbytes - sum(t.output.nbytes for t in planned.tensors.values())
    assert found.nbytes == planned.nbytes - header and 0 < header < 4096 and found.beside >= 500
    assert found.widest == found.nbytes * (1 if dtype == "float32" else 2)


def test_needs_grow_with_what_a_row_leaves(base: Path) -> None:
    (row,) = rows(base, Path("a"))
    weights = needs.weights_of(base, row.options.merge)
    streamed = replace(row, options=replace(row.options, merged_folder=False))
    packaged, both = (replace(row, target="hf", keep=keep) for keep in ("package", "both"))
    assert needs.scratch(streamed, weights) < needs.scratch(row, weights) < needs.scratch(packaged, weights)
    sizes = [needs.output(r, weights) for r in (streamed, row, both)]
    assert sizes == sorted(set(sizes)) and needs.output(packaged, weights) < sizes[1]


# --- states --------------------------------------------------------------------------------------------------


def test_plan_takes_states_from_the_store(base: Path, store: Store, tmp_path: Path) -> None:
    several = rows(base, *(adapter(tmp_path / name, n) for n, name in enumerate(("new", "done", "gate", "no"), 1)))
    keys = {n: p.key for n, p in planned(several, store, tmp_path).items()}
    put(store, "objects", keys["done"], "done", tmp_path)
    put(store, "failed", keys["gate"], "gate", tmp_path)
    put(store, "failed", keys["no"], "refused", tmp_path)
    put(store, "objects", "0" * 64, "done", tmp_path)  # of another jobs file, and of no interest
    assert set(store.records("objects", set(keys.values()))) == {keys["done"]} < set(store.records("objects"))
    found = planned(several, store, tmp_path)
    states = {"new": None, "done": "skipped", "gate": "gate", "no": "refused"}
    assert {n: p.state for n, p in found.items()} == states
    assert found["gate"].error == {"found": "told before"}
    again = {n: p.state for n, p in planned(several, store, tmp_path, again="failed").items()}
    assert again == states | {"gate": None}
    again = {n: p.state for n, p in planned(several, store, tmp_path, again="refused").items()}
    assert again == states | {"no": None}
    edit_json(tmp_path / "gate" / "adapter_config.json", lora_alpha=16)  # an input changes, and the verdict is gone
    assert planned(several, store, tmp_path)["gate"].state is None


def test_plan_object_counts_though_a_verdict_stands_beside_it(base: Path, store: Store, tmp_path: Path) -> None:
    (one,) = rows(base, adapter(tmp_path / "one"))
    key = planned([one], store, tmp_path)["one"].key
    put(store, "failed", key, "gate", tmp_path)
    put(store, "objects", key, "done", tmp_path)
    assert planned([one], store, tmp_path)["one"].state == "skipped"


def test_plan_damaged_verdict_is_none(base: Path, store: Store, tmp_path: Path) -> None:
    (one,) = rows(base, adapter(tmp_path / "one"))
    key = planned([one], store, tmp_path)["one"].key
    put(store, "failed", key, "gate", tmp_path)
    record = tmp_path / "root" / "failed" / key / "record.json"
    record.write_text(record.read_text().replace("gate", "gait"))
    assert planned([one], store, tmp_path)["one"].state is None


# --- shards --------------------------------------------------------------------------------------------------


def test_plan_shards_are_all_rows_once(base: Path, store: Store, tmp_path: Path) -> None:
    several = rows(base, *(adapter(tmp_path / f"a{n}", n) for n in range(12)), tmp_path / "gone")
    found = [list(planned(several, store, tmp_path, shard=f"{i}/3")) for i in range(3)]
    assert sorted(name for shard in found for name in shard) == sorted(r.name for r in several)
    assert all(found)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/0", "0/", "/3", "1.0/3", "²/3"])
def test_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--shard"):
        shard_of(text)
    assert shard_of(None) is None and shard_of("02/3") == (2, 3)


def test_shard_goes_by_the_key_not_by_the_place() -> None:
    one = PlannedRow(FleetRow("a", "b", "m", ("x",)), f"{5:064x}")
    assert in_shard(one, 2, 3) and in_shard(replace(one, row=replace(one.row, name="other")), 2, 3)


# --- what it costs -------------------------------------------------------------------------------------------

PLAN = """
import sys, json
from lora_export.api import plan_fleet
found = plan_fleet(sys.argv[1], sys.argv[2])
heavy = {"torch", "transformers", "onnxruntime", "peft"} & set(sys.modules)
print(json.dumps([[p.state for p in found], sorted(heavy)]))
"""


def test_plan_loads_no_torch(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapters" / "one")
    jobs = tmp_path / "jobs.toml"
    jobs.write_text(
        f'precision = "int4"\nfor = "genai"\n[base.b]\nmodel = "{base}"\n[[adapters]]\nglob = "adapters/*"\n'
    )
    words = [sys.executable, "-c", PLAN, str(jobs), str(tmp_path / "root")]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    )
    assert json.loads(done.stdout) == [[None], []]
    assert not (tmp_path / "root").exists()


def test_plan_opens_no_file_of_an_adapter_that_it_knows(
    base: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_export.keys import hashes

    monkeypatch.setattr(hashes, "SETTLED", -(10**12))
    several = rows(base, *(adapter(tmp_path / f"a{n}", n) for n in range(30)))
    first = planned(several, store, tmp_path)
    looked: list[Path] = []
    real = planning._refuse_adapter
    monkeypatch.setattr(planning, "_refuse_adapter", lambda f, single: (looked.append(f), real(f, single=single)))
    monkeypatch.setattr(hashes, "_hashed", lambda file: pytest.fail(f"{file.path} is read again"))
    assert planned(several, store, tmp_path) == first
    assert len(looked) == 1  # the others differ from it in numbers alone


def test_plan_root_that_is_a_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"something else: config\.json"):
        planned(rows(base, adapter(tmp_path / "a")), opened(str(base)), tmp_path)
