"""What real exports of a tiny decoder leave of an adapter, against figures computed here in float64."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import PeftModel

from lora_export.choices import Precision
from lora_export.commands.main import cli
from lora_export.commands.words import validation_words
from lora_export.contracts import (
    AdapterChoice,
    Check,
    ExportedPair,
    ExportOptions,
    MergeOptions,
    Source,
    ValidationResult,
)
from lora_export.errors import InputError
from lora_export.merging import CERTIFICATE, merge
from lora_export.onnx_export import export
from lora_export.progress import Silent
from lora_export.validation import ValidationOptions
from lora_export.validation.meter import metered
from lora_export.workflows.validating import validate_folder
from tests.builders import edit_json, lora, save_adapter
from tests.daily import later
from tests.validation.conftest import judged, save_base

TEXT = ("It is with great satisfaction that I", "The state of the Union is good. " * 3, "def f(x): return x")


class Models:
    """A base, adapters by name with the size of their numbers, merges, and exports that are made on demand."""

    def __init__(self, root: Path, scales: Mapping[str, float], dtype: torch.dtype = torch.float32) -> None:
        self.root = root
        self.base = save_base(root / "base", dtype)
        self.adapters = {name: self._adapter(name, scale) for name, scale in scales.items()}
        (root / "prompts.txt").write_text("\n".join(t.strip() for t in TEXT), encoding="utf-8")

    def _adapter(self, name: str, scale: float) -> Path:
        config = lora(target_modules=["q_proj", "v_proj", "down_proj"])
        return save_adapter(self.root / f"adapter-{name}", self.base, config, scale=scale)

    def merged(self, name: str) -> Path:
        if name == "base":
            return self.base
        folder = self.root / f"merged-{name}"
        if not folder.exists():
            merge(self.base, [AdapterChoice(self.adapters[name])], folder)
        return folder

    def onnx(self, name: str, precision: Precision) -> Path:
        folder = self.root / f"onnx-{name}-{precision}"
        if not folder.exists():
            export(self.merged(name), folder, ExportOptions(precision, "cpu"), progress=Silent())
        return folder

    def pair(self, name: str, precision: Precision, **changes: Any) -> ExportedPair:
        merged = self.onnx(changes.pop("exported", name), precision)
        size = sum(p.stat().st_size for p in merged.iterdir())
        return ExportedPair(merged, self.onnx("base", precision), precision, size, **changes)

    def validated(self, name: str, *pairs: ExportedPair) -> ValidationResult:
        merged, texts = self.merged("base" if name == "none" else name), self.root / "prompts.txt"
        return judged(self.base, self.adapters[name], merged, pairs, prompts=texts, text=texts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("precisions"), {"strong": 0.1, "weak": 0.004, "none": 0.0})


def check(result: ValidationResult, name: str) -> Check:
    return next(c for c in result.checks if c.name == name)


# --- the figures, computed here ----------------------------------------------------------------------------


def torch_outputs(models: Models, adapter: Path | None) -> list[np.ndarray]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).double().eval()
    with torch.no_grad():
        return [log_softmax(model(input_ids=ids[None]).logits[0].numpy()) for ids in tokens(models)]


def onnx_outputs(models: Models, folder: Path) -> list[np.ndarray]:
    """The graph on each whole text at once, its cache empty."""
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = []
    for ids in tokens(models):
        feeds: dict[str, np.ndarray] = {}
        for given in session.get_inputs():
            if given.name.startswith("past"):
                feeds[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
        feeds["input_ids"] = ids.numpy()[None]
        feeds["attention_mask"] = np.ones_like(feeds["input_ids"])
        found.append(log_softmax(session.run(["logits"], feeds)[0][0]))
    return found


def tokens(models: Models) -> list[torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.base)
    return [tokenizer("\n".join(t.strip() for t in TEXT), return_tensors="pt")["input_ids"][0]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def total(function: Callable[..., np.ndarray], *outputs: Sequence[np.ndarray]) -> float:
    return float(sum(function(*at).sum() for at in zip(*outputs, strict=True)))


@pytest.mark.parametrize("precision", [later("fp32"), "int4"])
def test_precisions_match_float64(models: Models, precision: Precision) -> None:
    result = models.validated("strong", models.pair("strong", precision))
    b, m = torch_outputs(models, None), torch_outputs(models, models.adapters["strong"])
    bq = onnx_outputs(models, models.onnx("base", precision))
    q = onnx_outputs(models, models.onnx("strong", precision))
    whole = total(lambda b, m: (np.exp(m) - np.exp(b)) * (m - b), b, m)
    kept = total(lambda b, m, bq, q: (np.exp(m) - np.exp(b)) * (q - bq), b, m, bq, q)
    positions = sum(len(ids) for ids in tokens(models))
    (survival,) = result.adapter_survival
    assert survival.model == f"onnx {precision}"
    # fp32 sums in another order, through the cache in pieces, move the logits in their sixth digit
    assert survival.share == pytest.approx(kept / whole, abs=1e-3)
    assert survival.kl_base == pytest.approx(total(lambda b, m: np.exp(b) * (b - m), b, m) / positions, rel=1e-3)
    lost = total(lambda m, q: np.exp(m) * (m - q), m, q) / positions
    assert survival.kl_lost == pytest.approx(lost, rel=1e-2, abs=1e-8)
    assert check(result, "onnx_adapter_survival").value == survival.share
    found = {p.model: p.value for p in result.perplexities}
    for name, outputs in {
        "base": b, "unmerged": m, f"onnx {precision} base": bq, f"onnx {precision}": q,
    }.items():  # fmt: skip
        assert found[name] == pytest.approx(perplexity(models, outputs), rel=1e-3), name


def perplexity(models: Models, outputs: Sequence[np.ndarray]) -> float:
    losses = [
        -p[t, ids[t + 1]] for ids, p in zip(tokens(models), outputs, strict=True) for t in range(len(ids) - 1)
    ]
    return math.exp(sum(losses) / len(losses))


def test_meter_measures_what_validation_judges(models: Models, tmp_path: Path) -> None:
    """One pair after the other, without the unmerged model in memory."""
    pair, texts = models.pair("strong", "int4"), models.root / "prompts.txt"
    result = models.validated("strong", pair)
    (judged,) = result.adapter_survival
    options = ValidationOptions(prompts=texts, text=texts, provider="cpu", seed=0)
    where = models.base, [AdapterChoice(models.adapters["strong"])], models.merged("strong")
    how = {"options": options, "scratch": tmp_path, "progress": Silent()}
    with metered(*where, dequantized=None, **how) as meter:  # type: ignore[arg-type]
        low, same = meter.measure(pair), meter.measure(replace(pair, merged=pair.base))
    assert (low.share, low.kl_lost) == (judged.share, judged.kl_lost)
    assert low.kl_allowed == check(result, "onnx_kl").threshold
    assert low.perplexity == {p.model: p.value for p in result.perplexities}["onnx int4"]
    assert same.share == pytest.approx(0, abs=1e-9), "a merged model without the adapter keeps nothing of it"
    assert not [*tmp_path.iterdir()]


# --- the gate ----------------------------------------------------------------------------------------------


def test_precisions_fp32_keeps_everything(models: Models) -> None:
    result = models.validated("strong", models.pair("strong", "fp32"))
    assert check(result, "onnx_adapter_survival").value == pytest.approx(1, abs=1e-3)
    assert result.passed, [c for c in result.checks if not c.passed]
    assert result.advice[0].startswith("Ship the fp32 export")


def test_precisions_gate_sees_missing_weak_adapter(models: Models, tmp_path: Path) -> None:
    """The others are measured against what int4 does to the base, which is more than a weak adapter does. Without a
    certificate, which would tell as well."""
    pair = models.pair("weak", "int4", exported="base")
    merged = tmp_path / "onnx"
    shutil.copytree(pair.merged, merged)
    (merged / "quantization.json").unlink()
    result = models.validated("weak", replace(pair, merged=merged))
    assert {c.name for c in result.checks if not c.passed} - {"onnx_kl"} == {"onnx_adapter_survival"}
    assert check(result, "onnx_adapter_survival").value == pytest.approx(0, abs=1e-6)
    assert result.advice[0].startswith("Do not ship int4")
    assert "lost to weights in int4" in result.advice[0]
    assert result.advice[0].endswith("--precision int8")


def test_precisions_certificate_of_another_model_is_noticed(models: Models) -> None:
    result = models.validated("weak", models.pair("weak", "int4", exported="base"))
    assert not check(result, "onnx_quantization_errors").passed


def test_precisions_without_effect_have_no_gate(models: Models) -> None:
    result = models.validated("none", models.pair("none", "fp32", exported="base"))
    assert [s.share for s in result.adapter_survival] == [None]
    assert not any(c.name.endswith("adapter_survival") for c in result.checks)
    assert result.advice == ()
    assert result.passed


# --- what lost the adapter ---------------------------------------------------------------------------------


def test_validate_small_change_rounded_away_advises_float32(tmp_path: Path) -> None:
    """The merge rounds most of the change away, which no export can bring back."""
    models = Models(tmp_path, {"small": 0.0015}, torch.bfloat16)
    result = models.validated("small", models.pair("small", "fp32"))
    assert {c.name for c in result.checks if not c.passed} == {"onnx_adapter_survival"}
    survival = json.loads((models.merged("small") / CERTIFICATE).read_text())["delta_survival"]
    (advice,) = result.advice
    assert f"rounded to bfloat16, which leaves {survival:.1%} of its change to the weights and " in advice
    assert advice.endswith("Merge with --dtype float32.") and survival < 0.1
    assert advice in validation_words(result)
    merge(models.base, [AdapterChoice(models.adapters["small"])], tmp_path / "wide", MergeOptions(dtype="float32"))
    export(tmp_path / "wide", tmp_path / "wide-onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    pair = replace(models.pair("small", "fp32"), merged=tmp_path / "wide-onnx")
    merge_options = MergeOptions(dtype="float32")
    wide = judged(models.base, models.adapters["small"], tmp_path / "wide", [pair], merge=merge_options)
    assert wide.passed and wide.advice[0].startswith("Ship the fp32 export")


def test_validate_graph_with_a_fault_advises_another_engine(models: Models, tmp_path: Path) -> None:
    """The weights are right, and the graph throws away what they compute."""
    pair = models.pair("strong", "fp32")
    shutil.copytree(pair.merged, tmp_path / "faulty")
    graph = onnx.load(str(tmp_path / "faulty" / "model.onnx"), load_external_data=False)
    scale = onnx.numpy_helper.from_array(np.float32(-1), "fault")
    graph.graph.initializer.append(scale)
    for node in graph.graph.node:
        node.output[:] = ["right" if name == "logits" else name for name in node.output]
    graph.graph.node.append(onnx.helper.make_node("Mul", ["right", "fault"], ["logits"]))
    (tmp_path / "faulty" / "model.onnx").write_bytes(graph.SerializeToString())
    result = models.validated("strong", replace(pair, merged=tmp_path / "faulty"))
    assert "onnx_adapter_survival" in {c.name for c in result.checks if not c.passed}
    assert "lost in the export: onnx_graph_max_abs fails" in result.advice[0]
    assert result.advice[0].endswith("try another --engine.")


def test_validate_merge_without_the_adapter_blames_the_merge(models: Models, tmp_path: Path) -> None:
    merge(models.base, [], tmp_path / "merged")
    pair = models.pair("strong", "fp32", exported="base")
    result = judged(models.base, models.adapters["strong"], tmp_path / "merged", [pair])
    assert "lost in the merge: tensor_errors fails" in result.advice[0]


# --- several exports, and the command ----------------------------------------------------------------------


def run(models: Models, name: str, onnx: Sequence[Path], *words: object) -> tuple[int, dict[str, Any], str]:
    command = ["validate", "-b", models.base, "-a", models.adapters[name], "-m", models.merged(name)]
    for folder in onnx:
        command += ["--onnx", folder]
    command += ["--provider", "cpu", "--prompts", models.root / "prompts.txt", "--json", *words]
    done = CliRunner().invoke(cli, list(map(str, command)))
    return done.exit_code, json.loads(done.stdout), done.stderr


def test_precisions_advise_smallest_sufficient(models: Models) -> None:
    exports = [models.onnx("strong", p) for p in ("int4", "fp32")]
    bases = [models.onnx("base", p) for p in ("int4", "fp32")]
    words = [w for folder in bases for w in ("--base-onnx", folder)]
    code, document, _ = run(models, "strong", exports, *words, "--min-survival", 0.999)
    found = {c["name"]: c for c in document["checks"]}
    assert not found["onnx_adapter_survival"]["passed"]
    assert found["onnx_fp32_adapter_survival"]["passed"]
    assert {"onnx_logits_max_abs", "onnx_fp32_logits_max_abs", "logits_max_abs"} <= set(found)
    assert [s["model"] for s in document["adapter_survival"]] == ["onnx int4", "onnx fp32"]
    assert document["advice"][0].startswith("Ship the fp32 export: it is the smallest of those measured")
    assert code == 3


def test_precisions_min_survival_0_accepts_any_share(models: Models) -> None:
    base = ("--base-onnx", models.onnx("base", "int4"))
    code, document, _ = run(models, "strong", [models.onnx("strong", "int4")], *base, "--min-survival", 0)
    check = next(c for c in document["checks"] if c["name"] == "onnx_adapter_survival")
    assert code == 0 and check["passed"] and check["threshold"] is None and check["value"] < 0.999
    assert document["advice"][0].startswith("Ship the int4 export")


def test_precisions_failed_gate_names_command(models: Models) -> None:
    code, document, talk = run(
        models, "strong", [models.onnx("strong", "int4")],
        "--base-onnx", models.onnx("base", "int4"), "--min-survival", 1,
    )  # fmt: skip
    assert code == 3 and "onnx_adapter_survival" in talk
    export_to = f"{models.onnx('strong', 'int4')}-int8"
    wanted = f"lora-export export -m {models.merged('strong')} -o {export_to} --precision int8"
    assert wanted in document["advice"][0]


def test_precisions_need_one_export_each(models: Models) -> None:
    exports = [models.onnx("strong", "int4")] * 2
    with pytest.raises(InputError, match="two of the exports are in int4") as caught:
        folder(models, exports, ())
    assert caught.value.next_step is not None
    code, _, talk = run(models, "strong", exports)
    assert code == 1 and "one at a time" in talk


def test_precisions_need_base_for_each_export_or_none(models: Models) -> None:
    exports = [models.onnx("strong", p) for p in ("int4", "fp32")]
    with pytest.raises(InputError, match="2 × --onnx and 1 × --base-onnx"):
        folder(models, exports, [models.onnx("base", "int4")])


def test_precisions_text_of_calibration_is_refused(models: Models, tmp_path: Path) -> None:
    calibrated = shutil.copytree(models.onnx("strong", "int4"), tmp_path / "onnx")
    read = hashlib.sha256((models.root / "prompts.txt").read_bytes()).hexdigest()
    edit_json(calibrated / "export.json", calibration={"text_sha256": read, "tokens": 40, "windows": 3})
    code, document, talk = run(models, "strong", [calibrated])
    assert code == 1 and "prompts.txt is the text that the export was calibrated on" in talk
    assert document["where"] == str(calibrated)


def folder(models: Models, exports: Sequence[Path], bases: Sequence[Path]) -> ValidationResult:
    adapters = [AdapterChoice(models.adapters["strong"])]
    base = Source("b", models.base)
    return validate_folder(base, adapters, models.merged("strong"), exports, bases, ValidationOptions(), Silent())
