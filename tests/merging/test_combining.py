"""Combined adapters against PEFT's add_weighted_adapter, and against the papers' formulas written out in numpy."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.deltas.draws import drawn
from lora_export.errors import AdapterError, InputError
from lora_export.merging import interference, merge, plan
from tests.builders import gpt2_config, llama_config, load, lora, save_adapter, save_base, tensors
from tests.daily import later

Llama = transformers.LlamaForCausalLM
GPT2 = transformers.GPT2LMHeadModel
SEED = 11
ALL = {"svd_rank": 200, "svd_full_matrices": False}  # a rank that truncates nothing
HEADS = {"majority_sign_method": "frequency"}
TARGETS = {
    Llama: (["q_proj", "v_proj", "down_proj"], ["q_proj", "o_proj", "down_proj"], ["v_proj", "down_proj"]),
    GPT2: (["c_attn", "c_proj"], ["c_attn", "c_fc"], ["c_attn", "wte"]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type, tuple[int, ...]], tuple[Path, list[Path]]]:
    """A base and adapters of these ranks, once each."""
    folder = tmp_path_factory.mktemp("combining")
    known: dict[Any, tuple[Path, list[Path]]] = {}

    def make(model: type, ranks: tuple[int, ...]) -> tuple[Path, list[Path]]:
        if (model, ranks) not in known:
            home = folder / f"{model.__name__}-{'-'.join(map(str, ranks))}"
            base = save_base(home / "base", model, llama_config() if model is Llama else gpt2_config())
            adapters = [
                save_adapter(
                    home / f"adapter-{i}",
                    base,
                    lora(rank, 2 * i + 5, target_modules=targets, fan_in_fan_out=model is GPT2),
                    model,
                    seed=20 + i,
                )
                for i, (rank, targets) in enumerate(zip(ranks, TARGETS[model], strict=False))
            ]
            known[model, ranks] = base, adapters
        return known[model, ranks]

    return make


def ours(base: Path, adapters: list[Path], weights: tuple[float, ...], out: Path, **options: Any) -> Any:
    choices = [AdapterChoice(a, w) for a, w in zip(adapters, weights, strict=True)]
    merge(base, choices, out, MergeOptions(**options))
    return tensors(out)


def pefts(
    base: Path,
    model: type,
    adapters: list[Path],
    weights: tuple[float, ...],
    method: str,
    masks: Any,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Weight → W + Δ in float64, the delta as PEFT's combined adapter has it."""
    loaded = peft.PeftModel.from_pretrained(load(base, model), str(adapters[0]), adapter_name="0")
    for i, folder in enumerate(adapters[1:], 1):
        loaded.load_adapter(str(folder), adapter_name=str(i))
    names = [str(i) for i in range(len(adapters))]
    with pytest.MonkeyPatch.context() as patch:
        if masks is not None:
            queue = masks(loaded, names)
            patch.setattr("peft.utils.merge_utils.random_pruning", lambda t, d, rescale: t * next(queue) / d)
        loaded.base_model.add_weighted_adapter(names, list(weights), "mixed", method, **settings)
    found = {}
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and ("mixed" in module.lora_A or "mixed" in module.lora_embedding_A):
            layer: Any = module
            weight = layer.get_base_layer().weight.detach().double()
            found[f"{name}.weight"] = weight + layer.get_delta_weight("mixed").detach().double()
    return found


def layers(loaded: Any, names: list[str]) -> Iterator[tuple[str, Any, list[int]]]:
    """PEFT's layers in its order, with the adapters that each has."""
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            has = [int(n) for n in names if n in module.lora_A or n in module.lora_embedding_A]
            if has:
                yield name, module, has


def masks_of_deltas(density: float) -> Any:
    def queue(loaded: Any, names: list[str]) -> Iterator[torch.Tensor]:
        for name, module, has in layers(loaded, names):
            for i in has:
                shape = tuple(module.get_delta_weight(str(i)).shape)
                yield drawn(SEED, f"{name}.weight", i, density, 0, shape)

    return queue


def masks_of_factors(density: float) -> Any:
    def queue(loaded: Any, names: list[str]) -> Iterator[torch.Tensor]:
        for name, module, has in layers(loaded, names):
            for what, matrices in (("A", module.lora_A), ("B", module.lora_B)):
                for i in has:
                    shape = tuple(matrices[str(i)].weight.shape)
                    yield drawn(SEED, f"{name}.weight/{what}", i, density, 0, shape)

    return queue


WEIGHTS = [(0.7, 0.3), (1.0, -0.5), (0.5, 0.8, 0.4)]
# our method, PEFT's, density, what else each is told
ON_DELTAS: list[tuple[str, str, float | None, dict[str, Any], dict[str, Any]]] = [
    ("linear", "cat", None, {}, {}),
    ("cat", "cat", None, {}, {}),
    ("linear", "svd", None, {"svd_rank": 3}, {"svd_rank": 3}),
    ("svd", "svd", None, {}, {}),
    ("svd", "svd", None, {"svd_rank": 2}, {"svd_rank": 2}),
    ("ties", "ties_svd", 0.2, {}, {**ALL}),
    ("ties", "ties_svd", 0.5, {"majority_sign": "frequency"}, {**ALL, **HEADS}),
    ("ties", "ties_svd", 0.4, {"svd_rank": 5}, {"svd_rank": 5}),
    ("magnitude_prune", "magnitude_prune_svd", 0.3, {}, {**ALL}),
    ("dare_linear", "dare_linear_svd", 0.3, {"seed": SEED}, {**ALL}),
    ("dare_ties", "dare_ties_svd", 0.6, {"seed": SEED}, {**ALL}),
]  # fmt: skip
ON_FACTORS: list[tuple[str, float | None, dict[str, Any], dict[str, Any]]] = [
    ("linear", None, {}, {}),
    ("ties", 0.3, {}, {}),
    ("ties", 0.6, {"majority_sign": "frequency"}, {"majority_sign_method": "frequency"}),
    ("magnitude_prune", 0.5, {}, {}),
    ("dare_linear", 0.4, {"seed": SEED}, {}),
    ("dare_ties", 0.7, {"seed": SEED}, {}),
]  # fmt: skip


def agree(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each merged weight; what PEFT has not touched is the base's."""
    assert len(theirs) >= 6
    for name, tensor in mine.items():
        wanted = theirs.get(name, base.get(name, base.get("transformer.wte.weight")).double())  # an untied head
        off = float((tensor.double() - wanted).norm() / wanted.norm())
        assert off <= 1e-5, f"{name}: {off:.2e}"


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", ON_DELTAS, ids=lambda c: f"{c[0]}-{c[2]}-{c[3]}")
@pytest.mark.parametrize("model", [Llama, later(GPT2)], ids=lambda m: m.__name__)
def test_combine_deltas_matches_peft(
    made: Any, tmp_path: Path, model: type, case: Any, weights: tuple[float, ...]
) -> None:
    method, theirs, density, mine, settings = case
    base, adapters = made(model, (4, 3, 5)[: len(weights)])
    merged = ours(base, adapters, weights, tmp_path / "out", combine=method, density=density, **mine)
    masks = masks_of_deltas(density) if density and method.startswith("dare") else None
    expected = pefts(base, model, adapters, weights, theirs, masks, density=density, **settings)
    agree(merged, expected, tensors(base))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("case", ON_FACTORS, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def test_combine_factors_matches_peft(made: Any, tmp_path: Path, case: Any, weights: tuple[float, ...]) -> None:
    method, density, mine, settings = case
    base, adapters = made(Llama, (4, 4, 4)[: len(weights)])
    options = {"combine": method, "combine_on": "factors", "density": density, **mine}
    merged = ours(base, adapters, weights, tmp_path / "out", **options)
    masks = masks_of_factors(density) if density and method.startswith("dare") else None
    expected = pefts(base, Llama, adapters, weights, method, masks, density=density, **settings)
    agree(merged, expected, tensors(base))


# --- the papers, by numpy -----------------------------------------------------------------------------------


def effective(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """What an adapter alone makes of each weight, less the base: float64, by PEFT's merge of one adapter."""
    model = peft.PeftModel.from_pretrained(load(base).double(), str(adapter)).merge_and_unload().double()
    before = tensors(base)
    return {n: p.detach().numpy() - before[n].double().numpy() for n, p in model.named_parameters() if n in before}


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    kept = np.zeros(delta.size)
    largest = np.argsort(-np.abs(delta), axis=None)[: int(density * delta.size)]
    kept[largest] = delta.reshape(-1)[largest]
    return kept.reshape(delta.shape)


def ties_of_the_paper(deltas: list[np.ndarray], scale: float, density: float) -> np.ndarray:
    """Algorithm 1: trim, elect the sign of the larger mass, average what agrees; then λ."""
    kept = [trimmed(d, density) for d in deltas]
    sign = np.sign(sum(kept))
    agreeing = [np.where(np.sign(d) == sign, d, 0.0) for d in kept]
    count = sum((a != 0).astype(float) for a in agreeing)
    return scale * np.divide(sum(agreeing), count, out=np.zeros_like(kept[0]), where=count > 0)


@pytest.fixture(scope="module")
def mixed_kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """LoRA, DoRA and LoHa on one base: only their deltas have anything in common."""
    folder = tmp_path_factory.mktemp("kinds")
    base = save_base(folder / "base")
    targets = ["q_proj", "down_proj"]
    kinds = [
        lora(target_modules=targets),
        lora(target_modules=targets, use_dora=True),
        peft.LoHaConfig(r=3, alpha=5, target_modules=targets, init_weights=False),
    ]
    return base, [save_adapter(folder / str(i), base, k, seed=40 + i) for i, k in enumerate(kinds)]


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_combine_ties_of_mixed_kinds_matches_paper(mixed_kinds: Any, tmp_path: Path, density: float) -> None:
    base, adapters = mixed_kinds
    merged = ours(base, adapters, (0.6, 0.6, 0.6), tmp_path / "out", combine="ties", density=density)
    deltas = [effective(base, a) for a in adapters]
    for name, before in tensors(base).items():
        parts = [d[name] for d in deltas]
        change = ties_of_the_paper(parts, 0.6, density) if any(p.any() for p in parts) else 0.0
        assert np.allclose(merged[name].double().numpy(), before.double().numpy() + change, rtol=1e-5, atol=1e-6)


def test_combine_weights_dora(mixed_kinds: Any, tmp_path: Path) -> None:
    base, adapters = mixed_kinds
    merged = ours(base, adapters[:2], (0.25, -2.0), tmp_path / "out", combine="linear")
    deltas = [effective(base, a) for a in adapters[:2]]
    for name, before in tensors(base).items():
        wanted = before.double().numpy() + 0.25 * deltas[0][name] - 2.0 * deltas[1][name]
        assert np.allclose(merged[name].double().numpy(), wanted, rtol=1e-5, atol=1e-6), name


def test_combine_dare_keeps_share_and_expected_sum(made: Any, tmp_path: Path) -> None:
    base, adapters = made(Llama, (4, 3))
    name, before = "model.layers.0.self_attn.o_proj.weight", tensors(base)
    plain = effective(base, adapters[1])[name]
    merged = [
        ours(base, adapters, (1.0, 1.0), tmp_path / str(s), combine="dare_linear", density=0.5, seed=s)[name]
        for s in range(40)
    ]
    changes = np.stack([(m.double() - before[name].double()).numpy() for m in merged])
    assert abs(float((changes != 0).mean()) - 0.5) < 0.01
    assert np.abs(changes.mean(0) - plain).mean() < 0.25 * np.abs(plain).mean()
    assert np.allclose(changes[0][changes[0] != 0], 2 * plain[changes[0] != 0], atol=1e-6)


# --- what must not depend on how it is cut ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "dare_ties", "magnitude_prune", "dare_linear", "svd", "cat"])
def test_combine_does_not_depend_on_blocks_or_runs(made: Any, tmp_path: Path, method: str) -> None:
    base, adapters = made(Llama, (4, 3, 5))
    density = None if method in ("svd", "cat") else 0.4
    options = {"combine": method, "density": density, "seed": SEED}
    outputs = [
        ours(base, adapters, (0.5, 0.8, 0.4), tmp_path / str(i), **options, **more)
        for i, more in enumerate([{}, {}, {"max_memory": 2**17}])
    ]
    for name, tensor in outputs[0].items():
        assert torch.equal(tensor, outputs[1][name]), name
        assert torch.allclose(tensor, outputs[2][name], rtol=1e-6, atol=1e-7), name


def test_dare_draws_do_not_depend_on_blocks() -> None:
    whole = drawn(3, "weight", 1, 0.3, 0, (1001,))
    for start, stop in itertools.pairwise([0, 1, 8, 13, 500, 1001]):
        assert torch.equal(whole[start:stop], drawn(3, "weight", 1, 0.3, start, (stop - start,)))
    assert 0.2 < float(whole.double().mean()) < 0.4
    assert not torch.equal(whole, drawn(3, "weight", 0, 0.3, 0, (1001,)))
    assert not torch.equal(whole, drawn(4, "weight", 1, 0.3, 0, (1001,)))
    assert not torch.equal(whole, drawn(3, "weights", 1, 0.3, 0, (1001,)))


# --- interference -------------------------------------------------------------------------------------------


def test_interference_matches_numpy(made: Any) -> None:
    base, adapters = made(Llama, (4, 3))
    choices = [AdapterChoice(adapters[0], 0.5), AdapterChoice(adapters[1], -2.0)]
    found = interference(plan(base, choices, MergeOptions()))
    first, second = effective(base, adapters[0]), effective(base, adapters[1])
    assert {i.tensor for i in found} == {None} | {n for n in first if first[n].any() and second[n].any()}
    dot = one = two = 0.0
    for entry in found:
        if entry.tensor is None:
            continue
        a, b = 0.5 * first[entry.tensor], -2.0 * second[entry.tensor]
        dot, one, two = dot + (a * b).sum(), one + (a**2).sum(), two + (b**2).sum()
        assert entry.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
        assert entry.sign_conflicts == pytest.approx((a * b < 0).mean(), abs=1e-3)
        assert entry.norm_ratio == pytest.approx(np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    overall = found[0]
    assert overall.tensor is None and (overall.first, overall.second) == ("adapter-0", "adapter-1")
    assert overall.cosine == pytest.approx(dot / (one * two) ** 0.5, rel=1e-5)
    assert overall.norm_ratio == pytest.approx((one / two) ** 0.5, rel=1e-5)


def test_interference_includes_adapter_weights(made: Any) -> None:
    base, adapters = made(Llama, (4, 3))
    options = MergeOptions(combine="ties", density=0.5)
    one, other = (
        interference(plan(base, [AdapterChoice(adapters[0], w), AdapterChoice(adapters[1], 0.5)], options))[0]
        for w in (1.0, -3.0)
    )
    assert one.norm_ratio and other.norm_ratio
    assert (other.norm_ratio / one.norm_ratio, other.cosine) == pytest.approx((3.0, -one.cosine))


def test_combine_untrained_adapter_changes_no_byte(made: Any, tmp_path: Path) -> None:
    """A is Gaussian and B zero before the first step (arXiv:2106.09685, sec. 4.1)."""
    base, _ = made(Llama, (4, 3))
    model = peft.get_peft_model(load(base), lora(init_lora_weights="gaussian"))
    model.save_pretrained(tmp_path / "untrained")
    assert all(t.any() == ("lora_A" in n) for n, t in tensors(tmp_path / "untrained").items())
    merge(base, [AdapterChoice(tmp_path / "untrained")], tmp_path / "merged")
    for shard in base.glob("*.safetensors"):
        assert (tmp_path / "merged" / shard.name).read_bytes() == shard.read_bytes()


def test_combine_adapter_and_its_negative_restores_base(made: Any, tmp_path: Path) -> None:
    base, adapters = made(Llama, (4, 3))
    found = interference(plan(base, [AdapterChoice(adapters[0]), AdapterChoice(adapters[0], -1.0)], MergeOptions()))
    assert (found[0].cosine, found[0].sign_conflicts, found[0].norm_ratio) == pytest.approx((-1.0, 1.0, 1.0))
    assert found[0].first != found[0].second


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"density": 0.2}, "--density says how adapters are combined"),
        ({"svd_rank": 2}, "--svd-rank says how adapters are combined"),
        ({"combine_on": "factors"}, "--combine-on factors says how adapters are combined"),
        ({"combine": "ties"}, "keeps a share of each delta, and --density is None"),
        ({"combine": "dare_linear", "density": 0.0}, "keeps a share"),
        ({"combine": "linear", "density": 0.2}, "prunes nothing"),
        ({"combine": "svd", "combine_on": "factors"}, "factors with --combine svd"),
        ({"combine": "linear", "combine_on": "factors", "svd_rank": 2}, "factors with .* --svd-rank"),
    ],
)  # fmt: skip
def test_combine_inconsistent_options_are_refused(made: Any, options: dict[str, Any], words: str) -> None:
    base, adapters = made(Llama, (4, 3))
    with pytest.raises(InputError, match=words) as refused:
        plan(base, [AdapterChoice(a) for a in adapters], MergeOptions(**options))
    assert refused.value.next_step


def test_combine_factors_of_different_ranks_is_refused(made: Any) -> None:
    base, adapters = made(Llama, (4, 3))
    with pytest.raises(AdapterError, match="the ranks here are 4 and 3") as refused:
        plan(base, [AdapterChoice(a) for a in adapters], MergeOptions(combine="linear", combine_on="factors"))
    assert refused.value.tensor and refused.value.tensor.endswith("_proj.weight")


def test_combine_kinds_without_factors_or_rank_is_refused(mixed_kinds: Any) -> None:
    base, adapters = mixed_kinds
    choices = [AdapterChoice(a) for a in adapters]
    with pytest.raises(AdapterError, match="factors, but this is dora"):
        plan(base, choices, MergeOptions(combine="linear", combine_on="factors"))
    with pytest.raises(InputError, match=r"not all of .* have a rank"):
        plan(base, choices, MergeOptions(combine="svd"))


def test_combine_replaced_weight_is_refused(made: Any, tmp_path: Path) -> None:
    base, adapters = made(Llama, (4, 3))
    whole = save_adapter(tmp_path / "whole", base, lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = save_adapter(tmp_path / "head", base, lora(target_modules=["lm_head"]), save_embeddings=False)
    options = MergeOptions(combine="ties", density=0.5)
    merged = ours(base, [adapters[0], whole], (0.5, 1.0), tmp_path / "out", combine="ties", density=0.5)
    saved = load_file_of(whole)
    assert torch.equal(merged["lm_head.weight"], saved)
    with pytest.raises(AdapterError, match=r"its weight is 0\.5"):
        plan(base, [AdapterChoice(adapters[0]), AdapterChoice(whole, 0.5)], options)
    with pytest.raises(AdapterError, match="another adapter changes it"):
        plan(base, [AdapterChoice(whole), AdapterChoice(head)], options)


def load_file_of(adapter: Path) -> torch.Tensor:
    return next(t for n, t in tensors(adapter).items() if "lm_head" in n)
