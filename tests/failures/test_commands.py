"""Every way a merge is refused on the command line: exit code, words, and nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import (
    edit_json,
    edit_tensors,
    llama_config,
    save_base,
    tensors,
)
from tests.failures.commands import everything, invoke, merge_words

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def first_shard(work: Path) -> Path:
    return min((work / "base").glob("*.safetensors"))


# --- damage, and what must be said about it ----------------------------------------------------------------


def another_model(work: Path) -> None:
    shutil.rmtree(work / "base")
    save_base(work / "base", config=llama_config(hidden_size=64, intermediate_size=96))


def fewer_layers(work: Path) -> None:
    shutil.rmtree(work / "base")
    save_base(work / "base", config=llama_config(num_hidden_layers=1))


def truncate(work: Path) -> None:
    path = first_shard(work)
    path.write_bytes(path.read_bytes()[:-100])


def pickled(work: Path) -> None:
    (work / "adapter" / WEIGHTS).rename(work / "adapter" / "adapter_model.bin")


def configure(**changes: Any) -> Callable[[Path], None]:
    return lambda work: edit_json(work / "adapter" / CONFIG, **changes)


def adapt(**changes: Any) -> Callable[[Path], None]:
    keys = {"A": A_KEY, "B": B_KEY}
    return lambda work: edit_tensors(work / "adapter" / WEIGHTS, {keys.get(k, k): v for k, v in changes.items()})


def delete(name: str) -> Callable[[Path], None]:
    def act(work: Path) -> None:
        path = work / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def nothing(work: Path) -> None: ...


NAN = torch.full((48, 6), float("nan"))
Q0 = "model.layers.0.self_attn.q_proj"
# name → (damage, more arguments, everything that the message says)
REFUSED: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "adapter of another model": (
        another_model,
        [],
        ["fits a weight of shape", "the base's has", "file:", "tensor:", "expected:", "try:", "inspect"],
    ),
    "adapter of a deeper model": (
        fewer_layers,
        [],
        ["the base does not have", "model.layers.1.", "expected:", "try:"],
    ),
    "truncated shard": (truncate, [], ["cut off", "model-00001-of-", "tensor:", "complete file", "try:"]),
    "missing lora_B": (adapt(B=None), [], ["lora_B of this module is missing", Q0, "expected:", "try:"]),
    "missing lora_A": (adapt(A=None), [], ["lora_A of this module is missing", Q0, "expected:", "try:"]),
    "ranks disagree": (adapt(A=torch.ones(5, 48)), [], ["disagree about the rank", Q0, "expected:"]),
    "rank is not the configured one": (
        configure(r=12),
        [],
        ["have rank 6", "rank 12", CONFIG, "layers.0", "expected:"],
    ),
    "half a convolution": (adapt(A=torch.ones(6, 48, 3, 3)), [], ["A has the shape", Q0, "expected:"]),
    "a convolution in groups": (
        adapt(A=torch.ones(6, 48, 3), B=torch.ones(48, 3, 1)),
        [],
        ["convolution in groups", "mixes the channels", Q0, "try:"],
    ),
    "pickled adapter": (pickled, [], ["pickled", "adapter_model.bin", "expected:", "try:"]),
    "no adapter weights": (delete(f"adapter/{WEIGHTS}"), [], ["no weights", WEIGHTS]),
    "no adapter config": (delete(f"adapter/{CONFIG}"), [], [f"no {CONFIG}", "expected:"]),
    "unknown peft_type": (configure(peft_type="WIZARDRY"), [], ["WIZARDRY", CONFIG, "expected:", "LORA"]),
    "no peft_type": (configure(peft_type=None, lora_alpha=None, r=None), [], ["r is None", CONFIG]),
    "prompt tuning": (configure(peft_type="PROMPT_TUNING"), [], ["virtual tokens", CONFIG, "expected:", "try:"]),
    "DoRA without magnitudes": (configure(use_dora=True), [], ["use_dora is set", "no magnitude", "try:"]),
    "magnitudes without DoRA": (
        adapt(**{f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(48)}),
        [],
        ["DoRA magnitudes", "use_dora is not set", "expected:"],
    ),
    "MonteCLoRA": (configure(monteclora_config={"x": 1}), [], ["MonteCLoRA", "monteclora_config is set", "try:"]),
    "KaSA": (configure(kasa_config={"x": 1}), [], ["KaSA", "truncated base", "try:"]),
    "aLoRA": (configure(alora_invocation_tokens=[1, 2]), [], ["aLoRA", "depends on the input", "try:"]),
    "Arrow": (configure(arrow_config={"x": 1}), [], ["Arrow", "each token", "try:"]),
    "QALoRA": (configure(use_qalora=True), [], ["QALoRA", "try:"]),
    "PiSSA": (
        configure(init_lora_weights="pissa_niter_4"),
        [],
        ["pissa_niter_4", "modified base", "path_initial_model_for_weight_conversion"],
    ),
    "CorDA": (configure(init_lora_weights="corda"), [], ["corda", "modified base", "try:"]),
    "LoRA-GA": (configure(init_lora_weights="lora_ga"), [], ["lora_ga", "modified base", "try:"]),
    "LoftQ": (configure(init_lora_weights="loftq"), [], ["loftq", "modified base", "try:"]),
    "layers that do not exist": (configure(layer_replication=[[0, 4]]), [], ["the layer 3", "has 2", "expected:"]),
    "no layer ranges": (configure(layer_replication=[[2, 0]]), [], ["layer_replication is", "expected:"]),
    "no trained tokens": (configure(trainable_token_indices=[1]), [], ["no trained rows", "try:"]),
    "tokens beyond the vocabulary": (
        lambda w: (
            configure(trainable_token_indices=[101])(w),
            adapt(
                **{"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 48)}
            )(w),
        ),
        [],
        ["resized to 102", "has 101 rows", "expected:", "try:"],
    ),
    "more rows than tokens": (
        lambda w: (
            configure(trainable_token_indices=[3])(w),
            adapt(
                **{"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 48)}
            )(w),
        ),
        [],
        ["2 trained rows", "1 tokens", "expected:"],
    ),
    "no fused experts": (
        configure(target_parameters=["x.weight"]),
        [],
        ["target_parameters names x.weight", "try:"],
    ),
    "alpha is no number": (configure(lora_alpha="16"), [], ["lora_alpha is '16'", CONFIG]),
    "r is no number": (configure(r=True), [], ["r is True", CONFIG]),
    "bias is no word": (configure(bias="some"), [], ["bias is 'some'", "none, all or lora_only"]),
    "rank_pattern is no regular expression": (
        configure(rank_pattern={"(": 3}),
        [],
        ["rank_pattern", "'('", CONFIG],
    ),
    "config is no JSON": (lambda w: (w / "adapter" / CONFIG).write_text("{"), [], ["not valid JSON", CONFIG]),
    "a tensor that nothing explains": (
        adapt(**{"base_model.model.x.mystery": torch.ones(2)}),
        [],
        ["no adapter kind accounts", "x.mystery", "try:"],
    ),
    "an empty adapter": (
        lambda w: edit_tensors(w / "adapter" / WEIGHTS, dict.fromkeys(tensors(w / "adapter"))),
        [],
        ["holds no tensors", "expected:"],
    ),
    "NaN in the adapter": (adapt(B=NAN), [], ["NaN or infinity", WEIGHTS, B_KEY, "expected:", "try:"]),
    "infinity in the adapter": (adapt(A=torch.full((6, 48), float("inf"))), [], ["NaN or infinity", A_KEY]),
    "overflow in float16": (
        adapt(B=torch.full((48, 6), 1e6)),
        ["--dtype", "float16"],
        ["NaN or infinity as F16", f"{Q0}.weight", "--dtype bfloat16"],
    ),
    "missing base": (delete("base"), [], ["no such folder", "expected:"]),
    "missing adapter": (delete("adapter"), [], ["no such folder", "expected:"]),
    "missing config.json": (delete("base/config.json"), [], ["cannot be read", "config.json"]),
    "missing shard": (lambda w: first_shard(w).unlink(), [], ["which is not there", "expected:", "try:"]),
    "code in the config": (
        lambda w: edit_json(w / "base" / "config.json", auto_map={"AutoModel": "x.Y"}),
        [],
        ["run code that came with the model", "config.json", "try:"],
    ),
    "weight on a replaced tensor": (
        lambda w: (
            configure(bias="all")(w),
            edit_tensors(w / "adapter" / WEIGHTS, {"base_model.model.model.norm.bias": torch.ones(48)}),
        ),
        ["-a", "{adapter}:0.5"],
        ["cannot be weighted with 0.5", "expected:"],
    ),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_merge_bad_input_is_refused(name: str, as_json: bool, work: Path) -> None:
    damage, more, said = REFUSED[name]
    damage(work)
    words = merge_words(work, *[m.format(adapter=work / "adapter") for m in more])
    if "{adapter}:0.5" in more:
        words[3:5] = []
    _check_refused(words + (["--json"] if as_json else []), work, said, as_json)


def _check_refused(
    words: list[object], folder: Path, said: list[str], as_json: bool = False, code: int = 1
) -> None:
    before = everything(folder)
    result = invoke(*words)
    assert result.exit_code == code, result.output
    for text in said:
        assert text in result.stderr, f"{text!r} not in:\n{result.stderr}"
    assert "Traceback" not in result.output and "internal error" not in result.output, result.output
    assert everything(folder) == before
    if as_json:
        document = json.loads(result.stdout)
        assert document["found"] and set(document) == {"error", "found", "where", "tensor", "expected", "next"}
    else:
        assert result.stdout == ""
        assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr


def test_merge_base_and_adapter_swapped_is_refused(work: Path) -> None:
    words = ["merge", "-b", work / "adapter", "-a", work / "base", "-o", work / "out"]
    _check_refused(words, work, ["is an adapter, not a base model", "swap -b and -a"])


def test_merge_existing_output_without_force_is_refused(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "mine").write_text("x")
    _check_refused(merge_words(work), work, ["exists and is not empty", "--force"])


@pytest.mark.parametrize("output", ["base", "adapter", "base/out", ".", "adapter/deep/er", "in", "in/out", "all"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_merge_output_overlapping_input_is_refused(work: Path, output: str, force: list[str]) -> None:
    (work / "in").symlink_to("base")
    (work / "all").symlink_to(work)
    words = ["merge", "-b", work / "base", "-a", work / "adapter", "-o", work / output, *force]
    _check_refused(words, work, ["lies inside an input or contains one", "-o"])


def test_merge_name_neither_folder_nor_hub_id_is_refused(work: Path) -> None:
    words = ["merge", "-b", "no such thing", "-a", work / "adapter", "-o", work / "out"]
    _check_refused(words, work, ["not a valid Hub ID", "no such thing"])


def test_merge_hub_id_offline_is_refused(work: Path) -> None:
    words = ["merge", "-b", "nobody-at-all/no-such-model", "-a", work / "adapter", "-o", work / "out"]
    _check_refused(words, work, ["nobody-at-all/no-such-model", "try:"])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["merge"],
        ["merge", "-b", "x"],
        ["merge", "-b", "x", "-a", "y", "-o", "z", "--dtype", "float12"],
        ["merge", "-b", "x", "-a", "y", "-o", "z", "--max-shard-size", "much"],
        ["merge", "-b", "x", "-a", "y", "-o", "z", "--max-memory", "-1GB"],
        ["merge", "-b", "x", "-a", "y", "-o", "z", "--no-such-option"],
        ["conjure"],
        ["inspect"],
    ],
)
def test_commands_wrong_usage_exits_with_two(words: list[str]) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize("as_json", [False, True])
def test_merge_json_prints_one_document_and_keeps_inputs(work: Path, as_json: bool) -> None:
    before = everything(work)
    result = invoke(*merge_words(work, *(["--json"] if as_json else [])))
    assert result.exit_code == 0, result.output
    after = everything(work)
    assert {k: v for k, v in after.items() if not k.startswith("out")} == before
    assert {k.split("/")[0] for k in after} == {"base", "adapter", "out"}
    if as_json:
        document = json.loads(result.stdout)
        needed = {
            "output",
            "tensors",
            "adapter_tensors",
            "seconds",
            "peak_rss_bytes",
            "delta_survival",
            "certificate",
        }
        assert needed <= set(document)
        assert document["tensors"]["updated"] == 6
        assert document["adapter_tensors"] == {"used": 12, "total": 12}
        assert Path(document["certificate"]).is_file()


def test_merge_dry_run_prints_plan_and_writes_nothing(work: Path) -> None:
    before = everything(work)
    result = invoke(*merge_words(work, "--dry-run", "--json"))
    assert result.exit_code == 0
    assert everything(work) == before
    plan = json.loads(result.stdout)
    assert plan["dry_run"] is True and plan["tensors"]["updated"] == 6
    assert {t["name"] for t in plan["plan"] if t["operation"] == "updated"} >= {f"{Q0}.weight"}
    assert json.loads(invoke(*merge_words(work, "--json")).stdout)["tensors"] == plan["tensors"]


def test_inspect_explains_misfit(work: Path) -> None:
    document = json.loads(invoke("inspect", work / "adapter", "-b", work / "base", "--json").stdout)
    assert document["fits_base"] is True and document["mergeable"] is True
    assert document["ranks"] == {"6": 6} and document["targets"] == {"q_proj": 2, "k_proj": 2, "down_proj": 2}
    assert json.loads(invoke("inspect", work / "base", "--json").stdout)["tied_embeddings"] is False
    another_model(work)
    document = json.loads(invoke("inspect", work / "adapter", "-b", work / "base", "--json").stdout)
    assert document["fits_base"] is False and "fits a weight of shape" in document["why_not"]
    configure(use_dora=True)(work)
    document = json.loads(invoke("inspect", work / "adapter", "--json").stdout)
    assert document["mergeable"] is False and "no magnitude" in document["reason"]


def test_merge_force_replaces_whole_output(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "stale.safetensors").write_text("x")
    assert invoke(*merge_words(work, "--force")).exit_code == 0
    names = {p.name for p in (work / "out").iterdir()}
    assert "stale.safetensors" not in names and "config.json" in names
    assert {p.name for p in work.iterdir()} == {"base", "adapter", "out"}


def test_merge_completes_short_writes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    invoke(*merge_words(work))
    expected = everything(work / "out")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, memoryview(data)[:1000], at))
    assert invoke(*merge_words(work, "--force")).exit_code == 0
    assert everything(work / "out") == expected


def test_installed_program_runs(work: Path) -> None:
    """A real process: exit codes, streams, one JSON document."""
    program = [str(Path(sys.executable).with_name("lora-export"))]
    words = [str(w) for w in merge_words(work, "--json")]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"]["updated"] == 6
    again = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "--force" in json.loads(again.stdout)["next"]
    assert "error: " in again.stderr and "Traceback" not in again.stderr
