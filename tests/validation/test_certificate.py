"""What a decoder's certificate says: its figures against figures computed here, and what moves its thresholds."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lora_export.contracts import AdapterChoice, Check, MergeOptions, ValidationResult
from lora_export.errors import InputError
from lora_export.merging import merge
from lora_export.progress import Silent
from lora_export.validation import ValidationOptions, validate
from lora_export.validation.comparing import lengths
from lora_export.validation.comparing.arithmetic import in_types
from lora_export.validation.comparing.logits import compare_logits, greedy_divergences
from lora_export.validation.comparing.noise import rounding_noise
from lora_export.validation.comparing.texts import PROMPTS, read_text, windows
from lora_export.validation.comparing.thresholds import Floor, Greedy, decoder_checks
from tests.failures.commands import invoke
from tests.validation.faults import unmerged_model

Folders = Callable[[str], tuple[Path, Path]]
Merged = Callable[[str], Path]
Array = NDArray[np.float64]
PROMPTS = (PROMPTS[0], PROMPTS[4])
TEXT = "Four score and seven years ago our fathers brought forth, on this continent, a new nation."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Few short prompts and a short text, so that a run takes a second."""
    root = tmp_path_factory.mktemp("words")
    (root / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root / "prompts.txt", root / "text.txt"


def judged(base: Path, adapter: Path, merged: Path, files: tuple[Path, Path], **more: float) -> ValidationResult:
    options = ValidationOptions(prompts=files[0], text=files[1], provider="cpu", **more)  # type: ignore[arg-type]
    return validate(base, [AdapterChoice(adapter)], merged, options=options, progress=Silent())


def named(checks: tuple[Check, ...] | list[Check]) -> dict[str, Check]:
    return {c.name: c for c in checks}


# --- the figures -------------------------------------------------------------------------------------------


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def test_compare_logits_matches_definition() -> None:
    dice = np.random.default_rng(3)
    lengths, vocabulary = (7, 4), 11
    one = [dice.standard_normal((n, vocabulary)) * 2 for n in lengths]
    other = [x + dice.standard_normal(x.shape) * 0.7 for x in one]
    ids = [dice.integers(0, vocabulary, n) for n in lengths]
    found = compare_logits(*([torch.tensor(x) for x in group] for group in (one, other, ids)))

    kl, top1, top5, own, theirs = [], [], [], [], []
    for a, b, tokens in zip(one, other, ids, strict=True):
        p, q = log_softmax(a), log_softmax(b)
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
        for i in range(len(a)):
            best = [set(np.argsort(-x[i])[:5].tolist()) for x in (a, b)]
            top1.append(a[i].argmax() == b[i].argmax())
            top5.append(len(best[0] & best[1]) / 5)
        own += [p[i, tokens[i + 1]] for i in range(len(a) - 1)]
        theirs += [q[i, tokens[i + 1]] for i in range(len(a) - 1)]
    assert found.max_abs == pytest.approx(max(abs(a - b).max() for a, b in zip(one, other, strict=True)))
    assert found.kl == pytest.approx(tuple(kl), abs=1e-12)
    assert 0 < np.mean(top1) < 1 and 0 < np.mean(top5) < 1
    assert found.top1 == pytest.approx(np.mean(top1))
    assert found.top5 == pytest.approx(np.mean(top5))
    assert (found.nll_reference, found.nll_found) == pytest.approx((-np.mean(own), -np.mean(theirs)))
    assert found.nll_spread == pytest.approx(np.abs(np.subtract(own, theirs)).mean())


def test_top5_of_small_vocabulary_works() -> None:
    logits = [torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])]
    assert compare_logits(logits, logits, [torch.tensor([0, 1])]).top5 == 1


@pytest.fixture
def prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No texts of drawn lengths beside the prompts, so that figures can be computed here."""
    monkeypatch.setattr(lengths, "choose", lambda *_: lengths.Lengths((), "the prompts alone"))


@pytest.mark.usefixtures("prompts_alone")
def test_validate_reports_perplexities_and_loaded_checks(
    folders: Folders, merged: Merged, files: tuple[Path, Path]
) -> None:
    base, adapter = folders("bfloat16")
    folder = merged("bfloat16")
    result = judged(base, adapter, folder, files)
    assert result.passed, [c for c in result.checks if not c.passed]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = {
        "base": load(base, dtype=torch.float32),
        "unmerged": unmerged_model(base, adapter),
        "merged": load(folder, dtype=torch.float32),
        "merged as loaded (bfloat16)": load(folder, dtype=torch.bfloat16),
    }
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])

    def logits(name: str, tokens: torch.Tensor) -> Array:
        with torch.no_grad():
            return np.asarray(models[name](input_ids=tokens[None]).logits[0].float().numpy(), np.float64)

    assert [p.model for p in result.perplexities] == list(models)
    for p in result.perplexities:
        said = log_softmax(logits(p.model, ids))[:-1]
        expected = math.exp(-np.mean([said[i, ids[i + 1]] for i in range(len(ids) - 1)]))
        assert p.value == pytest.approx(expected, rel=1e-4)
        assert p.tokens == len(ids) - 1

    prompts = [torch.tensor(tokenizer(p)["input_ids"]) for p in PROMPTS]
    loaded = max(abs(logits("unmerged", t) - logits("merged as loaded (bfloat16)", t)).max() for t in prompts)
    checks = named(result.checks)
    assert checks["loaded_logits_max_abs"].value == pytest.approx(loaded, rel=1e-3)
    assert loaded > checks["logits_max_abs"].value  # bf16 arithmetic adds to the rounding of the weights
    assert checks["loaded_noise_floor_max_abs"].value > checks["noise_floor_max_abs"].value
    assert "bfloat16" in checks["loaded_noise_floor_max_abs"].note
    assert {f"loaded_{x}" for x in ("logits_kl_mean", "top1_agreement", "top5_agreement")} <= set(checks)
    assert checks["run_to_run_max_abs"].value == 0


def test_validate_fp32_model_has_no_loaded_checks(
    folders: Folders, merged: Merged, files: tuple[Path, Path]
) -> None:
    result = judged(*folders("float32"), merged("float32"), files)
    assert not any(c.name.startswith("loaded_") for c in result.checks)
    assert [p.model for p in result.perplexities] == ["base", "unmerged", "merged"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_validate_rounded_base_passes(
    folders: Folders, tmp_path: Path, files: tuple[Path, Path], dtype: str
) -> None:
    """An fp32 base in another type: the weights without an adapter are rounded, too, and belong to the floor."""
    base, adapter = folders("float32")
    merge(base, [AdapterChoice(adapter)], tmp_path / "m", MergeOptions(dtype=dtype))  # type: ignore[arg-type]
    result = judged(base, adapter, tmp_path / "m", files)
    assert result.passed, [c for c in result.checks if not c.passed]
    assert result.deviation is None


def test_noise_is_removed_and_reaches_every_weight(folders: Folders) -> None:
    unmerged = unmerged_model(*folders("float32"))
    parameters = dict(unmerged.base_model.model.named_parameters())
    dtypes = {n.replace(".base_layer", ""): torch.bfloat16 for n in parameters if "lora_" not in n}
    before = {n: p.clone() for n, p in unmerged.named_parameters()}
    with rounding_noise(unmerged, dtypes, 0):
        moved = {n for n, p in unmerged.named_parameters() if not torch.equal(p, before[n])}
    assert any("o_proj.weight" in n for n in moved)  # has no adapter
    assert any("q_proj.base_layer.weight" in n for n in moved)
    assert not any("lora_" in n for n in moved)
    with in_types(unmerged, dtypes):
        types = {n: p.dtype for n, p in unmerged.named_parameters() if "lora_" not in n}
        assert set(types.values()) == {torch.bfloat16}
    assert all(torch.equal(p, before[n]) for n, p in unmerged.named_parameters())


# --- where greedy continuations part -----------------------------------------------------------------------


def parted() -> Greedy:
    """Step 2 of the second prompt: the reference prefers token 0 to token 2 by 1.5."""
    same, other = torch.eye(3)[[0, 1]] * 4, torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.5]])
    agreement, divergences = greedy_divergences([same, other], [torch.tensor([0, 1]), torch.tensor([1, 2])])
    return Greedy(agreement, divergences, lambda token: f" word{token}")


def test_validate_shows_first_diverging_token() -> None:
    ids = torch.tensor([0, 1, 2])
    logits = [torch.zeros(3, 3)]
    same = compare_logits(logits, logits, [ids])
    quiet = Floor(((replace(same, max_abs=0.1),),), 1.0, "made up")
    check = named(decoder_checks(quiet, same, parted()))["greedy_agreement"]
    assert check.value == 0.75 and not check.passed
    assert check.note.startswith(
        "prompt 2, token 2: unmerged ' word0', here ' word2', which the unmerged model finds 1.5"
    )
    assert "more than noise explains" in check.note
    loud = Floor(((replace(same, max_abs=0.2),),), 1.0, "made up")  # 2 × 4 × 0.2 covers the gap
    tie = named(decoder_checks(loud, same, parted()))["greedy_agreement"]
    assert tie.passed and "a tie within the noise" in tie.note


def test_validate_samples_show_divergence(folders: Folders, merged: Merged, files: tuple[Path, Path]) -> None:
    folder = merged("float32")
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].roll(1, 0).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    result = judged(*folders("float32"), folder, files)
    note = named(result.checks)["greedy_agreement"].note
    assert "prompt 1, token 1: unmerged '" in note
    assert str(result.samples[0].first_difference) in note


# --- what moves the thresholds -----------------------------------------------------------------------------


def test_floor_includes_run_to_run_difference() -> None:
    ids = torch.tensor([0, 1, 2])
    logits = [torch.zeros(3, 3)]
    same = compare_logits(logits, logits, [ids])
    quiet, restless = ((replace(same, max_abs=x),) for x in (0.1, 0.02))
    assert Floor((quiet, restless), 0.0, "").max_abs == pytest.approx(0.12)


@pytest.mark.usefixtures("prompts_alone")
def test_tolerance_scales_every_threshold(folders: Folders, merged: Merged, files: tuple[Path, Path]) -> None:
    folder = merged("bfloat16")
    usual, twice = (named(judged(*folders("bfloat16"), folder, files, tolerance=f).checks) for f in (4.0, 8.0))
    for prefix in ("", "loaded_"):
        floor = usual[f"{prefix}noise_floor_max_abs"].value
        positions = sum(len(p.encode()) for p in PROMPTS)  # every byte is a token
        limits = {n: (usual[prefix + n].threshold, twice[prefix + n].threshold) for n in THRESHOLDS}
        assert limits["logits_max_abs"] == pytest.approx((4 * floor, 8 * floor))
        assert limits["logits_kl_mean"][1] == pytest.approx(4 * limits["logits_kl_mean"][0])
        for name in ("top1_agreement", "top5_agreement"):
            missed = [1 - limit - 3 / positions for limit in limits[name]]
            assert missed[1] == pytest.approx(2 * missed[0], abs=1e-12)
        perplexity = usual[f"{prefix}perplexity_unmerged"].value
        spread = [math.log(limit / perplexity) for limit in limits["perplexity_merged"]]
        assert spread[1] == pytest.approx(2 * spread[0])
        assert twice[f"{prefix}logits_max_abs"].note.startswith("8 × the noise floor")


THRESHOLDS = ("logits_max_abs", "logits_kl_mean", "top1_agreement", "top5_agreement", "perplexity_merged")


def test_validate_command_takes_tolerance_and_text(
    folders: Folders, merged: Merged, files: tuple[Path, Path]
) -> None:
    base, adapter = folders("float32")
    words = ["validate", "-b", base, "-a", adapter, "-m", merged("float32"), "--prompts", files[0]]
    done = invoke(*words, "--text", files[1], "--tolerance", "6.5")
    assert done.exit_code == 0, done.output
    assert "6.5 × the noise floor" in done.stdout
    assert "perplexity unmerged" in done.stdout and "on 89 tokens" in done.stdout


def test_validate_nan_outputs_give_valid_json(folders: Folders, merged: Merged) -> None:
    """A NaN passes no check, and JSON has no word for it."""
    base, adapter = folders("float32")
    folder = merged("float32")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    done = invoke("validate", "-b", base, "-a", adapter, "-m", folder, "--json")
    assert done.exit_code == 3, done.output
    document = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert not document["passed"] and document["weight_errors"][0] == "model.norm.weight"


@pytest.mark.parametrize("factor", ["0.5", "-1", "nan", "inf", "many"])
def test_validate_invalid_tolerance_is_usage_error(tmp_path: Path, factor: str) -> None:
    done = invoke("validate", "-b", tmp_path, "-a", tmp_path, "-m", tmp_path, "--tolerance", factor)
    assert done.exit_code == 2
    assert "--tolerance" in done.output


# --- the text ----------------------------------------------------------------------------------------------


def test_built_in_text_is_a_few_pages() -> None:
    assert 500 <= len(read_text(None).split()) <= 800


def test_perplexity_reads_long_text_in_windows(folders: Folders) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders("float32")[0])
    pieces = windows(tokenizer, "a" * 1025, 320)
    assert [len(p) for p in pieces] == [512, 512]  # the last one alone would predict nothing


BAD_TEXTS = {
    "missing": (None, "cannot read the text"),
    "a folder": ("folder", "cannot read the text"),
    "not UTF-8": (b"caf\xe9 " * 50, "not UTF-8"),
    "empty": (b" \n", "empty"),
    "too short": (b"A few words.", "12 tokens, too few"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_validate_bad_text_is_refused(
    folders: Folders, merged: Merged, files: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    content, words = BAD_TEXTS[case]
    text = tmp_path / "text.txt"
    if content == "folder":
        text.mkdir()
    elif isinstance(content, bytes):
        text.write_bytes(content)
    base, adapter = folders("float32")
    done = invoke(
        "validate", "-b", base, "-a", adapter, "-m", merged("float32"), "--prompts", files[0], "--text", text
    )
    assert done.exit_code == 1
    assert words in done.stderr and "text.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_merge_and_export_bad_text_is_refused_first(folders: Folders, tmp_path: Path) -> None:
    base, adapter = folders("float32")
    out = tmp_path / "out"
    done = invoke(
        "merge-and-export", "-b", base, "-a", adapter, "-o", out, "--text", tmp_path / "none", "--provider", "cpu"
    )
    assert done.exit_code == 1 and "cannot read the text" in done.stderr
    assert "merge:" not in done.stderr and not out.exists()


def test_read_text_names_expected_format(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_text(tmp_path / "t")
