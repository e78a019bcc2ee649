"""`lora-export verify`: whatever was changed after a merge is found, and named."""

import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_export.merging import CERTIFICATE
from lora_export.storage.sealed import json_text, write_sealed
from tests.builders import edit_json, edit_tensors, llama_config, lora, save_adapter, save_base
from tests.failures.commands import everything, invoke, merge_words
from tests.failures.faults import Faults, failing

Q0 = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter and out: two shards in bf16, an index, a tokenizer, a chat template."""
    work = tmp_path_factory.mktemp("verify")
    base = save_base(work / "base", dtype=torch.bfloat16, max_shard_size=60_000)
    for name, text in {"tokenizer.json": '{"version": "1.0"}\r\n', "chat_template.jinja": "{{ x }}"}.items():
        (base / name).write_text(text)
    save_adapter(work / "adapter", base, lora(modules_to_save=["lm_head"]))
    assert invoke(*merge_words(work)).exit_code == 0
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


def verify(work: Path, *more: object, inputs: bool = True) -> tuple[int, dict[str, Any]]:
    given = ["-b", work / "base", "-a", work / "adapter"] if inputs else []
    result = invoke("verify", work / "out", *given, "--json", *more)
    assert "Traceback" not in result.output and "internal error" not in result.output
    return result.exit_code, json.loads(result.stdout)


def failed(document: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for check in document["checks"]:
        if not check["passed"]:
            found.setdefault(check["name"], []).append(check["note"])
    return found


def forge(work: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit the certificate, and give it a digest that fits."""
    path = work / "out" / CERTIFICATE
    document = json.loads(path.read_text())
    del document["digest"]
    change(document)
    write_sealed(path, document)


def record(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in document["records"] if r["name"] == name)


@pytest.mark.parametrize("certify", ["sampled", "full"])
def test_verify_untouched_folder_passes(work: Path, certify: str) -> None:
    before = everything(work)
    code, document = verify(work, "--certify", certify)
    assert (code, document["verified"], failed(document)) == (0, True, {})
    names = [c["name"] for c in document["checks"]]
    assert {"certificate", "files", "output_hashes", "adapter_hashes", "arithmetic", "figures"} <= set(names)
    assert all("arithmetic" not in text for text in document["not_checked"])
    assert everything(work) == before


def test_verify_without_base_checks_hashes_and_says_so(work: Path) -> None:
    code, document = verify(work, inputs=False)
    assert (code, document["verified"]) == (0, True)
    assert {c["name"] for c in document["checks"]} == {"certificate", "files", "output_hashes"}
    assert "the arithmetic" in document["not_checked"][0] and "(-b)" in document["not_checked"][0]
    words = invoke("verify", work / "out").stdout
    assert "nothing else was checked" in words and "not checked" in words


@pytest.mark.parametrize("seed", range(36))
def test_verify_flipped_byte_anywhere_is_found(work: Path, seed: int) -> None:
    """Each file in turn, at a seeded place; without base and adapter, too."""
    chance = random.Random(seed)
    files = sorted(p for p in (work / "out").iterdir())
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    for inputs in (True, False):
        code, document = verify(work, inputs=inputs)
        assert (code, document["verified"]) == (3, False), (path.name, place)
        notes = [n for found in failed(document).values() for n in found]
        assert any(path.name in n for n in notes), (path.name, place, notes)


def test_verify_flipped_byte_names_file_and_tensor(work: Path) -> None:
    name = next(p.name for p in (work / "out").glob("*.safetensors") if Q0 in tensors_of(p))
    changed = tensors_of(work / "out" / name)[Q0]
    changed[3, 5] += 1
    rewritten(work / "out" / name, Q0, changed)
    code, document = verify(work, "--certify", "full")
    assert code == 3
    assert f"{name}, tensor {Q0}" in failed(document)["output_hashes"][0]
    assert any(f"{name}, tensor {Q0}" in n and "row 3" in n for n in failed(document)["arithmetic"])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def rewritten(path: Path, name: str, value: torch.Tensor) -> None:
    """The tensor's bytes in place, the header as it is."""
    from lora_export.checkpoint.header import read_header

    info = read_header(path).tensors[name]
    with path.open("r+b") as f:
        f.seek(info.start)
        f.write(value.contiguous().view(torch.uint8).numpy().tobytes())


# --- a certificate that was edited, with its digest made anew ------------------------------------------------

EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "survival": lambda d: record(d, Q0).update(survival=record(d, Q0)["survival"] * 0.99),
    "relative delta": lambda d: record(d, Q0).update(relative_delta=1e-3),
    "max ulps": lambda d: record(d, Q0).update(max_ulps=0.25),
    "mean ulps": lambda d: record(d, Q0).update(mean_ulps=0.1),
    "checked": lambda d: record(d, Q0).update(checked=7),
    "saturated": lambda d: record(d, Q0).update(saturated=2),
    "operation": lambda d: record(d, Q0).update(operation="copied"),
    "kinds": lambda d: record(d, Q0).update(kinds=["dora"]),
    "input hash": lambda d: record(d, Q0).update(hash_in="0" * 64),
    "output hash": lambda d: record(d, NORM).update(hash_out="0" * 64),
    "a record less": lambda d: d["records"].pop(),
    "a record more": lambda d: d["records"].append(d["records"][0] | {"name": "x"}),
    "order of records": lambda d: d["records"].reverse(),
    "overall survival": lambda d: d.update(delta_survival=0.5),
    "counts": lambda d: d["tensors"].update(copied=99),
    "adapter tensors": lambda d: d["adapter_tensors"].update(used=1),
    "dtype option": lambda d: d["options"].update(dtype="float32"),
    "base weights option": lambda d: d["options"].update(base_weights="original"),
    "expert option": lambda d: d["options"].update(expert_packing="expert"),
    "training option": lambda d: d["options"].update(training_double_quant=True),
    "shard option": lambda d: d["options"].update(max_shard_size=10**9),
    "no such option": lambda d: d["options"].update(speed=2),
    "an option of another kind": lambda d: d["options"].update(max_memory="much"),
    "adapter kind": lambda d: d["adapters"][0].update(kind="DoRA"),
    "adapter weight": lambda d: d["adapters"][0].update(weight=0.5),
    "adapter hash": lambda d: d["adapters"][0]["sha256"].update({"adapter_config.json": "0" * 64}),
    "base size": lambda d: next(iter(d["base"]["files"].values())).update(size=5),
    "a file's hash": lambda d: d["files"]["config.json"].update(sha256="0" * 64),
    "a file less": lambda d: d["files"].pop("tokenizer.json"),
    "a header's hash": lambda d: d["files"]["model-00001-of-00002.safetensors"].update(header_sha256="0" * 64),
    "arithmetic": lambda d: d.update(arithmetic="exact"),
    "bound": lambda d: d.update(bound="0"),
    "unchecked": lambda d: d["unchecked"].update({Q0: "no time"}),
    "base checks": lambda d: d["base_checks"].pop(),
    "a field more": lambda d: d.update(approved=True),
    "a field less": lambda d: d.pop("records"),
    "schema": lambda d: d.update(schema_version=1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_verify_edited_certificate_is_found(work: Path, edit: str) -> None:
    forge(work, EDITS[edit])
    code, document = verify(work)
    assert (code, document["verified"]) == (3, False)
    assert failed(document)


def test_verify_forged_weights_and_certificate_are_found(work: Path) -> None:
    """One number of a row that is looked at, and every hash made to fit: the arithmetic tells."""
    from lora_export.checkpoint.hashing import hash_tensor
    from lora_export.checkpoint.header import read_header

    path = next(p for p in (work / "out").glob("*.safetensors") if Q0 in tensors_of(p))
    changed = tensors_of(path)[Q0]
    changed[0, 0] += 0.5
    rewritten(path, Q0, changed)
    digest = hash_tensor(read_header(path).tensors[Q0])
    forge(work, lambda d: record(d, Q0).update(hash_out=digest))
    assert verify(work, inputs=False)[1]["verified"] is True
    code, document = verify(work)
    assert code == 3 and f"{path.name}, tensor {Q0}" in failed(document)["arithmetic"][0]


def negate(work: Path, name: str, rows: slice | list[int]) -> Path:
    """Rows of a merged tensor with the other sign, and its hash in the certificate made to fit."""
    from lora_export.checkpoint.hashing import hash_tensor
    from lora_export.checkpoint.header import read_header

    path = next(p for p in (work / "out").glob("*.safetensors") if name in tensors_of(p))
    changed = tensors_of(path)[name]
    changed[rows] *= -1
    rewritten(path, name, changed)
    digest = hash_tensor(read_header(path).tensors[name])
    forge(work, lambda d: record(d, name).update(hash_out=digest))
    return path


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def tall(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A merge in which most rows of a weight are none that its certificate looks at; in bf16, or as asked for."""
    work = tmp_path / "tall"
    save_base(
        work / "base", config=llama_config(intermediate_size=1024), dtype=getattr(request, "param", torch.bfloat16)
    )
    save_adapter(work / "adapter", work / "base", lora(target_modules=["q_proj", "up_proj"]))
    assert invoke(*merge_words(work)).exit_code == 0
    return work


def hidden_rows() -> list[int]:
    """Those of UP that no certificate looks at."""
    from lora_export.merging.running.exact import sampled_runs

    shape = (1024, 48)
    return sorted(set(range(1024)) - {row for start, stop in sampled_runs(shape) for row in range(start, stop)})


def test_verify_rows_outside_certificate_are_compared(tall: Path) -> None:
    negate(tall, UP, hidden_rows())
    code, document = verify(tall)
    assert code == 3 and len(hidden_rows()) > 512
    assert f"{len(hidden_rows())} of 1024 rows are not what the merge writes" in failed(document)["arithmetic"][0]


def test_verify_sampled_draws_other_rows_each_time(tall: Path) -> None:
    """Most rows are forged, so any draw of 64 has some; the seed is told, and draws the same rows again."""
    negate(tall, UP, hidden_rows())
    code, document = verify(tall, "--certify", "sampled")
    assert code == 3 and UP in failed(document)["arithmetic"][0]
    verdicts = {verify(tall, "--certify", "sampled", "--rows", 1)[1]["not_checked"][0] for _ in range(3)}
    assert len(verdicts) == 3 and all("--seed" in text for text in verdicts)
    seeded = [verify(tall, "--certify", "sampled", "--rows", 1, "--seed", 5)[1]["not_checked"] for _ in range(2)]
    assert seeded[0] == seeded[1] and "all other rows of the computed tensors" in seeded[0][0]


@pytest.mark.parametrize("tall", [torch.float32], indirect=True)
@pytest.mark.parametrize(("change", "code"), [(0, 0), (1, 3)])
def test_verify_other_torch_accepts_last_bits_and_says_so(tall: Path, change: int, code: int) -> None:
    """In fp32 the last bit may be another processor's; more than that is wrong. Of this torch, every bit agrees."""
    path = tall / "out" / "model.safetensors"
    values, row = tensors_of(path)[UP], hidden_rows()[5]
    values.view(torch.int32)[row, 3] ^= 1
    values[row, 4] += change
    rewritten(path, UP, values)
    negate(tall, UP, [])
    assert verify(tall)[0] == 3
    forge(tall, lambda d: d["versions"].update(torch="1.0"))
    found, document = verify(tall)
    assert found == code, failed(document)
    if not code:
        assert "the last bits of 1 rows in 1 tensors" in document["verdict"]
        assert any("done by torch 1.0" in text for text in document["not_checked"])


def test_verify_forged_companion_is_found(work: Path) -> None:
    import hashlib

    text = b"{{ something_else }}"
    (work / "out" / "chat_template.jinja").write_bytes(text)
    entry = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    forge(work, lambda d: d["files"].update({"chat_template.jinja": entry}))
    assert verify(work, inputs=False)[1]["verified"] is True
    code, document = verify(work)
    assert code == 3 and "chat_template.jinja" in failed(document)["written_files"][0]


def test_verify_reformatted_certificate_is_refused(work: Path) -> None:
    """The same content in another layout is not the file that was written."""
    path = work / "out" / CERTIFICATE
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert verify(work)[0] == 3
    text = json_text(json.loads(path.read_text()))
    path.write_bytes(text.replace("\n", "\r", 1).encode())
    assert verify(work)[0] == 3
    path.write_text(text)
    assert verify(work)[0] == 0


# --- other inputs, other files -------------------------------------------------------------------------------


def test_verify_other_adapter_fails(work: Path) -> None:
    save_adapter(work / "other", work / "base", lora(modules_to_save=["lm_head"]), seed=8)
    shutil.rmtree(work / "adapter")
    (work / "other").rename(work / "adapter")
    code, document = verify(work)
    assert code == 3 and {"adapter_hashes", "arithmetic"} <= failed(document).keys()
    assert any("adapter_model.safetensors" in n for n in failed(document)["adapter_hashes"])


def test_verify_other_base_fails(work: Path) -> None:
    shutil.rmtree(work / "base")
    save_base(work / "base", dtype=torch.bfloat16, max_shard_size=60_000, seed=8)
    code, document = verify(work)
    assert code == 3 and {"arithmetic", "figures"} <= failed(document).keys()
    assert any("hash_in" in n for n in failed(document)["figures"])
    result = invoke("verify", work / "out", "-b", work / "base", "--json")
    assert result.exit_code == 3 and "base_hashes" in failed(json.loads(result.stdout))


def test_verify_base_of_other_shapes_fails(work: Path) -> None:
    path = next(p for p in (work / "base").glob("*.safetensors") if Q0 in tensors_of(p))
    edit_tensors(path, {Q0: torch.zeros(40, 48, dtype=torch.bfloat16)})
    code, document = verify(work)
    assert code == 3 and "plan" in failed(document)


def test_verify_other_adapter_weight_fails(work: Path) -> None:
    save_adapter(work / "plain", work / "base", lora())
    shutil.rmtree(work / "out")
    words = ["merge", "-b", work / "base", "-a", f"{work / 'plain'}:0.7", "-o", work / "out"]
    assert invoke(*words).exit_code == 0
    given = ["verify", work / "out", "-b", work / "base", "-a"]
    assert invoke(*given, f"{work / 'plain'}:0.7").exit_code == 0
    wrong = invoke(*given, work / "plain")
    assert wrong.exit_code == 3 and "-a DIR:WEIGHT" in wrong.stdout


@pytest.mark.parametrize("inputs", [True, False])
def test_verify_missing_or_extra_file_is_found(work: Path, inputs: bool) -> None:
    (work / "out" / "modeling.py").write_text("import os")
    (work / "out" / "tokenizer.json").unlink()
    code, document = verify(work, inputs=inputs)
    assert code == 3
    assert failed(document)["files"] == ["tokenizer.json is missing", "modeling.py was added after the merge"]


def test_verify_missing_shard_is_found(work: Path) -> None:
    (work / "out" / "model-00002-of-00002.safetensors").unlink()
    code, document = verify(work)
    assert code == 3 and "model-00002-of-00002.safetensors is missing" in failed(document)["files"]


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda w: (w / "out" / CERTIFICATE).unlink(), "there is no lora_export_certificate.json"),
        (lambda w: shutil.rmtree(w / "out"), "no such folder"),
        (lambda w: shutil.rmtree(w / "base"), "is not a valid Hub ID"),
        (lambda w: (w / "adapter" / "adapter_config.json").unlink(), "no adapter_config.json here"),
    ],
)
def test_verify_bad_input_exits_with_one(work: Path, spoil: Callable[[Path], object], text: str) -> None:
    spoil(work)
    code, document = verify(work)
    assert code == 1 and "error" in document


def test_verify_read_error_is_explained(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a sealed output may fail: exit code 1, and never a verdict."""
    given = ["verify", work / "out", "-b", work / "base", "-a", work / "adapter"]
    faults = Faults.of_reading(monkeypatch, work)
    faults.disarm()
    assert invoke(*given).exit_code == 0
    points = len(faults.seen)
    assert points > 100
    for nth in random.Random(1).sample(range(1, points + 1), 25):
        faults.arm(nth, failing(errno.EIO))
        result = invoke(*given)
        faults.disarm()
        assert result.exit_code in (1, 3), (nth, result.output)
        assert "Traceback" not in result.output and "internal error" not in result.output, (nth, result.output)
        assert "verified" not in result.stdout.replace("NOT verified", "")


# --- a whole run ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(work: Path) -> Path:
    """A run folder without the stages that take long: the manifest is written as pipeline writes it."""
    from lora_export import manifest
    from lora_export.contracts import AdapterChoice, Source, StoryOptions
    from lora_export.contracts.option import kept

    folder = work / "run"
    folder.mkdir()
    (work / "out").rename(folder / "merged")
    (folder / "report").mkdir()
    (folder / "report" / "report.md").write_text("# fine")
    base, adapter = Source("base", work / "base"), AdapterChoice(work / "adapter")
    manifest.write(folder, base, [adapter], kept(StoryOptions()))
    folder.rename(work / "out")
    return work


def test_verify_run_checks_manifest(run: Path) -> None:
    code, document = verify(run)
    assert (code, failed(document)) == (0, {})
    assert {"manifest", "run_files", "base_files", "adapter_files", "arithmetic"} <= {
        c["name"] for c in document["checks"]
    }


@pytest.mark.parametrize("seed", range(12))
def test_verify_run_flipped_byte_is_found(run: Path, seed: int) -> None:
    chance = random.Random(seed)
    files = sorted(p for p in (run / "out").rglob("*") if p.is_file())
    path = files[seed % len(files)]
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    code, document = verify(run)
    assert (code, document["verified"]) == (3, False)
    assert any(path.name in n for notes in failed(document).values() for n in notes), path.name


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda w: (w / "out" / "report" / "report.md").unlink(), "run_files"),
        (lambda w: (w / "out" / "extra.txt").write_text("x"), "run_files"),
        (lambda w: edit_json(w / "base" / "config.json", x=1), "base_files"),
        (lambda w: edit_json(w / "adapter" / "adapter_config.json", x=1), "adapter_files"),
    ],
)
def test_manifest_records_inputs_and_options(run: Path, spoil: Callable[[Path], object], check: str) -> None:
    spoil(run)
    code, document = verify(run)
    assert code == 3 and check in failed(document)


def test_verify_edited_manifest_is_found(run: Path) -> None:
    path = run / "out" / "manifest.json"
    document = json.loads(path.read_text())
    del document["digest"]
    document["options"]["merge"]["dtype"] = "float16"
    write_sealed(path, document)
    code, found = verify(run)
    assert code == 3 and "merge options" in failed(found)["manifest"][0]


def test_small_change_is_bounded_by_fp32(made: Path, tmp_path: Path) -> None:
    """Blocks of other heights sum in another order; the survival of a change of 1e-4 of the weight then differs."""
    work = tmp_path / "work"
    shutil.copytree(made / "base", work / "base")
    save_adapter(work / "adapter", work / "base", lora(), scale=0.005)
    assert invoke(*merge_words(work)).exit_code == 0
    said = record(json.loads((work / "out" / CERTIFICATE).read_text()), Q0)
    slack = 2.0**-22 / said["relative_delta"]
    assert 1e-4 < slack < 0.05
    for factor, code in ((1 + slack / 2, 0), (1 + 1e-3 + 2 * slack, 3)):
        survival = said["survival"] * factor
        forge(work, lambda d, survival=survival: record(d, Q0).update(survival=survival))  # type: ignore[misc]
        assert verify(work)[0] == code
