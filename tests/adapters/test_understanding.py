"""Every figure of `inspect -a` against numpy, and its words against adapters that are known to be ill."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner

from lora_export.adapter_tools.understand import understand
from lora_export.commands.main import cli
from lora_export.contracts import ModuleFigures
from lora_export.errors import InputError
from lora_export.report.adapter_page import picture
from tests.builders import edit_json, edit_tensors, gpt2_config, load, lora, save_adapter, save_base, tensors

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("understanding") / "base")


def changes(base: Path, adapter: Path, model: Any = transformers.LlamaForCausalLM) -> dict[str, np.ndarray]:
    """What PEFT's merge of the adapter changes, float64."""
    tuned = peft.PeftModel.from_pretrained(load(base, model).double(), str(adapter)).merge_and_unload().double()
    before = {n: p.detach() for n, p in load(base, model).double().named_parameters()}
    found = {n: (p.detach() - before[n]).numpy() for n, p in tuned.named_parameters()}
    return {n: d for n, d in found.items() if np.abs(d).max() > 1e-9}


def agree(module: ModuleFigures, delta: np.ndarray, weight: np.ndarray | None) -> None:
    sizes = np.linalg.svd(delta, compute_uv=False)
    count = len(module.singular_values)
    assert np.allclose(module.singular_values, sizes[:count], atol=1e-6 * sizes[0]), module.name
    assert (sizes[count:] < 1e-6 * sizes[0]).all()
    shares = sizes[sizes > 1e-9 * sizes[0]] / sizes.sum()
    assert module.effective_rank == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-3)
    assert module.stable_rank == pytest.approx(float((sizes**2).sum() / sizes[0] ** 2), rel=1e-5)
    energy = np.cumsum(sizes**2) / (sizes**2).sum()
    assert np.allclose(module.energy, energy[:count], atol=1e-6)
    assert module.enough == int((energy < 0.99).sum()) + 1
    assert module.norm == pytest.approx(float(np.linalg.norm(delta)), rel=1e-5)
    if weight is None:
        assert module.weight_norm is None and module.relative is None
    else:
        assert module.weight_norm == pytest.approx(float(np.linalg.norm(weight)), rel=1e-5)
        assert module.relative == pytest.approx(float(np.linalg.norm(delta) / np.linalg.norm(weight)), rel=1e-5)


KINDS: dict[str, Any] = {
    "lora": lora(target_modules=TARGETS),
    "rslora": lora(target_modules=TARGETS, use_rslora=True, rank_pattern={"down_proj": 3},
                   alpha_pattern={"q_proj": 9}),
    "dora": lora(target_modules=TARGETS, use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=5, target_r=3, lora_alpha=7, target_modules=TARGETS, total_step=10),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=4, target_modules=TARGETS),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS, init_weights=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_understand_with_base_matches_numpy(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, KINDS[kind])
    found, deltas, weights = understand(adapter, base), changes(base, adapter), tensors(base)
    assert {m.name for m in found.modules} == set(deltas) and not found.skipped
    total = sum((d**2).sum() for d in deltas.values())
    for module in found.modules:
        agree(module, deltas[module.name], weights[module.name].double().numpy())
        assert module.share == pytest.approx(float((deltas[module.name] ** 2).sum() / total), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "adalora", "loha", "lokr"])
def test_understand_additive_kind_needs_no_base(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, KINDS[kind])
    found, deltas = understand(adapter), changes(base, adapter)
    assert {m.name for m in found.modules} == set(deltas)
    for module in found.modules:
        agree(module, deltas[module.name], None)


def test_understand_transposed_layer_has_same_figures(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", transformers.GPT2LMHeadModel, gpt2_config())
    kind = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = save_adapter(tmp_path / "adapter", base, kind, transformers.GPT2LMHeadModel)
    deltas = changes(base, adapter, transformers.GPT2LMHeadModel)
    for module in understand(adapter, base).modules:
        agree(module, deltas[module.name], tensors(base)[module.name].double().numpy())


def test_understand_reports_rank_alpha_and_scaling(base: Path, tmp_path: Path) -> None:
    found = understand(save_adapter(tmp_path / "adapter", base, KINDS["rslora"])).modules
    by_type = {m.type: (m.rank, m.alpha, m.scaling) for m in found}
    assert by_type["q_proj"] == (6, 9, pytest.approx(9 / 6**0.5))
    assert by_type["down_proj"] == (3, 15, pytest.approx(15 / 3**0.5))
    plain = understand(save_adapter(tmp_path / "plain", base, KINDS["lora"])).modules[0]
    assert (plain.rank, plain.alpha, plain.scaling) == (6, 15, 2.5)


def test_understand_reports_energy_kept_by_truncation(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, KINDS["lora"])
    deltas = changes(base, adapter)
    squares = {n: np.linalg.svd(d, compute_uv=False) ** 2 for n, d in deltas.items()}
    total = sum(s.sum() for s in squares.values())
    truncation = understand(adapter).truncation
    assert [t.rank for t in truncation] == [1, 2, 4, 6]
    for rank, kept, left in ((t.rank, t.energy_kept, t.parameters) for t in truncation):
        assert kept == pytest.approx(sum(s[:rank].sum() for s in squares.values()) / total, rel=1e-5)
        assert left == pytest.approx(rank / 6)


def test_understand_dora_without_base_says_what_is_measured(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, KINDS["dora"])
    module = understand(adapter).modules[0]
    stored = tensors(adapter)
    path = f"base_model.model.{module.name.removesuffix('.weight')}"
    delta = 2.5 * (stored[f"{path}.lora_B.weight"] @ stored[f"{path}.lora_A.weight"])
    agree(module, delta.double().numpy(), None)
    assert "before the magnitudes" in module.note


def test_understand_kinds_that_need_base_are_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, KINDS["ia3"])
    with pytest.raises(InputError, match=r"ia3.* depends on the base") as refused:
        understand(adapter)
    assert "-b BASE" in str(refused.value.next_step)


# --- words --------------------------------------------------------------------------------------------------


def handmade(base: Path, folder: Path, change: Any, rank: int = 6, **config: Any) -> Path:
    """A LoRA whose matrices are what `change` makes of (A, B)."""
    adapter = save_adapter(folder, base, lora(rank, target_modules=TARGETS))
    stored = tensors(adapter)
    for key in [k for k in stored if "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        stored[key], stored[other] = change(key, stored[key], stored[other])
    edit_tensors(adapter / "adapter_model.safetensors", stored)
    if config:
        edit_json(adapter / "adapter_config.json", **config)
    return adapter


def orthogonal(key: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linalg.qr(a.T)[0].T.contiguous(), torch.linalg.qr(b)[0].contiguous()


def of_one_direction(key: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return a, b * torch.tensor([1.0, *[1e-3] * (b.shape[1] - 1)])


def test_understand_rank_advice_follows_spectrum(base: Path, tmp_path: Path) -> None:
    spare = understand(handmade(base, tmp_path / "spare", of_one_direction))
    assert any("larger than needed: of 6" in s for s in spare.sentences)
    full = understand(handmade(base, tmp_path / "full", orthogonal))
    assert any("may have been too small: of 6" in s for s in full.sentences)
    assert not spare.warnings and not full.warnings


def of_first_layer(key: str, a: torch.Tensor, b: torch.Tensor, factor: float) -> Any:
    return a, b * (factor if "layers.0" in key and "q_proj" in key else 1.0)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda k, a, b: (a, 0 * b), {}, r"every delta is zero: .* saved before"),
        (lambda k, a, b: of_first_layer(k, a, b, 0.0), {}, "1 of 4 modules are dead, .*layers.0.self_attn.q_proj"),
        (lambda k, a, b: of_first_layer(k, a, b, 1e-4), {}, "1 q_proj changed by less than 0.001"),
        (lambda k, a, b: of_first_layer(k, a, b, float("nan")), {}, "1 modules hold NaN or infinity, .*layers.0"),
        (lambda k, a, b: (a, 100 * b), {}, r"4 changes are larger than their weights, .* by \d+\.\d times"),
        (lambda k, a, b: (a, b / 1000), {"lora_alpha": 6000}, "the scaling alpha/rank is 1000"),
        (lambda k, a, b: (a, b), {"alpha_pattern": {"v_proj": 3}}, "alpha_pattern has the key 'v_proj'"),
    ],
    ids=["untrained", "dead", "hardly", "nan", "exploded", "alpha", "pattern"],
)  # fmt: skip
def test_understand_warns_of_trouble(
    base: Path, tmp_path: Path, change: Any, config: dict[str, Any], words: str
) -> None:
    sound = understand(handmade(base, tmp_path / "sound", lambda k, a, b: (a, b / 50)), base)
    assert sound.warnings == ()
    found = understand(handmade(base, tmp_path / "ill", change, **config), base)
    assert any(re.search(words, w) for w in found.warnings), found.warnings


# --- the picture and the command ----------------------------------------------------------------------------


def test_adapter_page_has_figures_and_no_script(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "<script>alert(1)", base, KINDS["lora"])
    document = understand(adapter, base)
    page = picture(document, Path("a.html"))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<svg") == 2 and "var(--ink)" in page
    for name, one in document.by_type.items():
        assert name in page and f"{one.share:.1%}" in page
    assert picture(document, Path("a.html")) == page
    alone = picture(document, Path("a.svg"))
    assert alone.startswith("<svg") and "--ink:" in alone and "q_proj" in alone


def test_inspect_adapter_prints_text_and_json(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, KINDS["lora"], scale=0.02)
    page = tmp_path / "a.html"
    command = ["inspect", "-a", str(adapter), "-b", str(base)]
    told = CliRunner().invoke(cli, [*command, "-v", "--picture", str(page)])
    assert told.exit_code == 0, told.output
    assert "Share of ‖ΔW‖²" in told.stdout and "model.layers.1.mlp.down_proj" in told.stdout
    assert page.is_file() and "no signs of trouble" in told.stdout
    document = json.loads(CliRunner().invoke(cli, [*command, "--json", "-q"]).stdout)
    assert {"rank", "alpha", "scaling", "norm", "relative", "singular_values"} <= document["modules"][0].keys()
    again = CliRunner().invoke(cli, [*command, "--picture", str(page)])
    assert again.exit_code == 1 and "the picture exists" in again.stderr
    other = CliRunner().invoke(cli, [*command, "--picture", str(tmp_path / "a.png")])
    assert other.exit_code == 1 and ".svg or .html" in other.stderr
    assert CliRunner().invoke(cli, ["inspect"]).exit_code == 2
    assert CliRunner().invoke(cli, ["inspect", str(adapter), "-a", str(adapter)]).exit_code == 2
    assert CliRunner().invoke(cli, ["inspect", str(adapter), "--picture", "a.svg"]).exit_code == 2
