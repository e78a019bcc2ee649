"""Tools on pipelines and single-file adapters: extract, combined merges, truncate, combine, switch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_export import api
from lora_export.contracts import AdapterChoice, MergeOptions, RankOptions
from lora_export.errors import LoraExportError
from lora_export.merging.pipelines.merging import merge_pipeline
from lora_export.progress import Silent
from tests.diffusion.made import write_pipeline

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
Tensors = dict[str, torch.Tensor]


def filled(folder: Path, seed: int = 0) -> Path:
    """The pipeline of made.py with random numbers in fp32."""
    write_pipeline(folder)
    generator = torch.Generator().manual_seed(seed)
    for name in (UNET, TEXT):
        shapes = {k: v.shape for k, v in load_file(folder / name).items()}
        save_file({k: torch.randn(s, generator=generator) for k, s in shapes.items()}, folder / name)
    return folder


def changed(base: Path, folder: Path, changes: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A copy of the base with something added to its weights."""
    filled(folder)
    for name, deltas in changes.items():
        tensors = load_file(base / name)
        save_file({**tensors, **{k: tensors[k] + d for k, d in deltas.items()}}, folder / name)
    return folder


def low_rank(rank: int, *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = torch.Size(shape[1:]).numel()
    left, right = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return (left @ right).reshape(shape)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("extract") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """A convolution of rank 3, a linear layer of rank 2, a text encoder's of rank 1, a bias and an embedding."""
    unet = {
        "conv_in.weight": low_rank(3, 8, 4, 3, 3),
        f"{Q}.weight": low_rank(2, 8, 8),
        "conv_in.bias": torch.full((8,), 0.25),
    }
    text = {
        f"{FC1}.weight": low_rank(1, 12, 6),
        "text_model.embeddings.token_embedding.weight": torch.ones(20, 6),
    }
    return changed(base, base.parent / "tuned", {UNET: unet, TEXT: text})


def merged(base: Path, out: Path, *adapters: Path | AdapterChoice, **options: Any) -> Path:
    choices = [a if isinstance(a, AdapterChoice) else AdapterChoice(a) for a in adapters]
    merge_pipeline(base, choices, out, MergeOptions(**options), Silent())
    return out


def close(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    for name in (UNET, TEXT):
        one, two = load_file(first / name), load_file(second / name)
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.allclose(value, two[key], rtol=0, atol=tolerance), key


# --- extract -----------------------------------------------------------------------------------------------


def test_extract_gives_ranks_and_merging_back_gives_tuned_pipeline(base: Path, tuned: Path, tmp_path: Path) -> None:
    made = api.extract(base, tuned, tmp_path / "lora", RankOptions(energy=1.0))
    assert dict(made.ranks) == {"unet.conv_in": 3, f"unet.{Q}": 2, f"text_encoder.{FC1}": 1}
    assert made.error < 1e-6 and not made.dropped
    assert made.whole == ("text_encoder.text_model.embeddings.token_embedding.diff", "unet.conv_in.diff_b")
    close(merged(base, tmp_path / "out", tmp_path / "lora"), tuned)


def test_extract_writes_names_shapes_and_scaling_of_diffusers(base: Path, tuned: Path, tmp_path: Path) -> None:
    api.extract(base, tuned, tmp_path / "lora", RankOptions(energy=1.0), rest="drop")
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    assert {k: tuple(v.shape) for k, v in load_file(path).items()} == {
        "unet.conv_in.lora_A.weight": (3, 4, 3, 3),
        "unet.conv_in.lora_B.weight": (8, 3, 1, 1),
        f"unet.{Q}.lora_A.weight": (2, 8),
        f"unet.{Q}.lora_B.weight": (8, 2),
        f"text_encoder.{FC1}.lora_A.weight": (1, 6),
        f"text_encoder.{FC1}.lora_B.weight": (12, 1),
    }
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"], told["text_encoder.r"]) == (3, 3, 1)
    assert told["unet.rank_pattern"] == told["unet.alpha_pattern"] == {Q: 2}


def test_extract_at_lower_rank_tells_error_that_is_left(base: Path, tuned: Path, tmp_path: Path) -> None:
    made = api.extract(base, tuned, tmp_path / "lora", RankOptions(rank=1), rest="drop")
    out = merged(base, tmp_path / "out", tmp_path / "lora")
    lost = total = 0.0
    for name, keys in ((UNET, ["conv_in.weight", f"{Q}.weight"]), (TEXT, [f"{FC1}.weight"])):
        one, two, start = load_file(out / name), load_file(tuned / name), load_file(base / name)
        lost += sum(float((one[k] - two[k]).double().square().sum()) for k in keys)
        total += sum(float((two[k] - start[k]).double().square().sum()) for k in keys)
    assert made.error == pytest.approx((lost / total) ** 0.5, rel=1e-3) and made.error > 0.1
    assert sorted(made.dropped) == [
        "text_encoder.text_model.embeddings.token_embedding.weight", "unet.conv_in.bias",
    ]  # fmt: skip


def test_extract_refuses_what_lora_cannot_represent_if_told_to(base: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraExportError, match="a weight that LoRA cannot represent"):
        api.extract(base, tuned, tmp_path / "lora", RankOptions(rank=1), rest="refuse")
    assert not (tmp_path / "lora").exists()


def test_extract_of_unet_alone_merges_into_unet_and_pipeline(base: Path, tuned: Path, tmp_path: Path) -> None:
    api.extract(base / "unet", tuned / "unet", tmp_path / "lora", RankOptions(energy=1.0))
    out = merged(base, tmp_path / "out", tmp_path / "lora")
    for key, value in load_file(tuned / UNET).items():
        assert torch.allclose(load_file(out / UNET)[key], value, rtol=0, atol=1e-5)
    assert torch.equal(load_file(out / TEXT)[f"{FC1}.weight"], load_file(base / TEXT)[f"{FC1}.weight"])


def test_extract_refuses_pipelines_of_other_components(base: Path, tmp_path: Path) -> None:
    other = filled(tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    del index["text_encoder"]
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(LoraExportError, match="differ in their components: text_encoder"):
        api.extract(base, other, tmp_path / "lora", RankOptions(rank=1))
    with pytest.raises(LoraExportError, match="one of the two is a pipeline"):
        api.extract(base, other / "text_encoder", tmp_path / "lora", RankOptions(rank=1))


# --- combined merges ---------------------------------------------------------------------------------------


def kohya_file(path: Path, seed: int, names: tuple[str, ...] = ("conv_in", Q)) -> Path:
    """LoRAs of rank 2 and alpha 1 on a convolution and a linear layer."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in names:
        spelling, inputs = f"lora_unet_{name.replace('.', '_')}", (4, 3, 3) if name == "conv_in" else (8,)
        ones = (1,) * (len(inputs) - 1)
        tensors[f"{spelling}.lora_down.weight"] = torch.randn(2, *inputs, generator=generator)
        tensors[f"{spelling}.lora_up.weight"] = torch.randn(8, 2, *ones, generator=generator)
        tensors[f"{spelling}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def delta_of(path: Path, name: str) -> torch.Tensor:
    tensors, spelling = load_file(path), f"lora_unet_{name.replace('.', '_')}"
    up, down = (tensors[f"{spelling}.lora_{part}.weight"].double() for part in ("up", "down"))
    return (0.5 * up.flatten(1) @ down.flatten(1)).reshape(8, *down.shape[1:])


def ties(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Trim, elect by the sum of the deltas, and the weighted mean of those that agree (arXiv:2306.01708)."""
    trimmed = []
    for delta in deltas:
        least = delta.abs().flatten().topk(int(density * delta.numel())).values[-1]
        trimmed.append(torch.where(delta.abs() >= least, delta, 0.0))
    elected = torch.where(torch.stack(trimmed).sum(0) >= 0, 1.0, -1.0)
    agree = [d.sign() == elected for d in trimmed]
    total = sum(w * d * a for w, d, a in zip(weights, trimmed, agree, strict=True))
    return torch.as_tensor(total) / torch.stack(agree).sum(0).clamp(min=1)


WEIGHTS = (0.75, -0.5)


def combined(base: Path, folder: Path, **options: Any) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Name → what two files combined add to a weight, and the delta of each."""
    files = [kohya_file(folder / f"{i}.safetensors", i) for i in (1, 2)]
    choices = [AdapterChoice(f, w) for f, w in zip(files, WEIGHTS, strict=True)]
    out, start = load_file(merged(base, folder / "out", *choices, **options) / UNET), load_file(base / UNET)
    return {
        name: (out[f"{name}.weight"].double() - start[f"{name}.weight"], [delta_of(f, name) for f in files])
        for name in ("conv_in", Q)
    }


def test_linear_combination_of_two_files_is_weighted_sum(base: Path, tmp_path: Path) -> None:
    for made, deltas in combined(base, tmp_path, combine="linear").values():
        wanted = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))
        assert torch.allclose(made, wanted, rtol=0, atol=1e-6)


def test_ties_of_two_files_elects_signs_of_convolutions_too(base: Path, tmp_path: Path) -> None:
    for made, deltas in combined(base, tmp_path, combine="ties", density=0.5).values():
        wanted = ties(deltas, WEIGHTS, 0.5)
        assert torch.allclose(made, wanted, rtol=0, atol=1e-6) and bool((wanted == 0).any())


def test_dare_of_two_files_drops_and_rescales(base: Path, tmp_path: Path) -> None:
    for made, deltas in combined(base, tmp_path, combine="dare_linear", density=0.5).values():
        first, second = (w * d / 0.5 for w, d in zip(WEIGHTS, deltas, strict=True))
        possible = torch.stack([torch.zeros_like(first), first, second, first + second])
        assert float((possible - made).abs().amin(0).max()) < 1e-6
        assert 0 < float((made.abs() < 1e-6).double().mean()) < 0.5


# --- truncate ----------------------------------------------------------------------------------------------


def cut(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest of that rank (Eckart and Young, 1936), by numpy."""
    left, sizes, right = np.linalg.svd(delta.flatten(1).numpy(), full_matrices=False)
    return torch.from_numpy((left[:, :rank] * sizes[:rank]) @ right[:rank]).reshape(delta.shape)


def added(base: Path, out: Path, name: str) -> torch.Tensor:
    after, before = load_file(out / UNET)[f"{name}.weight"], load_file(base / UNET)[f"{name}.weight"]
    return after.double() - before.double()


def test_truncate_keeps_names_and_largest_singular_values(base: Path, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "style.safetensors", 1)
    more = {"lora_unet_conv_in.diff_b": torch.ones(8), "bundle_emb.<x>.clip_l": torch.ones(1, 6)}
    save_file(load_file(file) | more, file, {"ss_network_dim": "2", "ss_network_alpha": "1", "ss_tag": "kept"})
    made = api.truncate(file, tmp_path / "small", RankOptions(rank=1))
    small = tmp_path / "small" / "style.safetensors"
    assert set(made.ranks.values()) == {1} and load_file(small).keys() == load_file(file).keys()
    assert load_file(small)["lora_unet_conv_in.lora_down.weight"].shape == (1, 4, 3, 3)
    assert torch.equal(load_file(small)["bundle_emb.<x>.clip_l"], torch.ones(1, 6))
    with safe_open(small, "pt") as opened:
        told = opened.metadata()
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_tag"]) == ("1", "1", "kept")
    save_file({k: v for k, v in load_file(small).items() if "bundle" not in k}, tmp_path / "merged.safetensors")
    out = merged(base, tmp_path / "out", tmp_path / "merged.safetensors")
    for name in ("conv_in", Q):
        assert torch.allclose(added(base, out, name), cut(delta_of(file, name), 1), rtol=0, atol=1e-6)
    assert torch.allclose(load_file(out / UNET)["conv_in.bias"], load_file(base / UNET)["conv_in.bias"] + 1)


def test_truncate_rewrites_alpha_of_diffusers_metadata(base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"unet.{Q}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"unet.{Q}.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    file = tmp_path / "style.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})})
    api.truncate(file, tmp_path / "small", RankOptions(rank=1))
    out = merged(base, tmp_path / "out", tmp_path / "small")
    whole = 3 * (tensors[f"unet.{Q}.lora_B.weight"].double() @ tensors[f"unet.{Q}.lora_A.weight"].double())
    assert torch.allclose(added(base, out, Q), cut(whole, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "metadata", "said"),
    [
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"], {}, "is loha .* not two matrices of one rank"),
        (["lora_down.weight", "lora_up.weight", "dora_scale"], {}, "is dora"),
        (["lora_up.weight"], {}, "has lora_up without lora_down"),
        (["lora_down.weight", "lora_up.weight"], {"ss_network_args": '{"split_qkv": true}'}, "split_qkv"),
    ],
)
def test_truncate_refuses_what_has_no_two_factors(
    tmp_path: Path, names: list[str], metadata: dict[str, str], said: str
) -> None:
    save_file({f"lora_unet_conv_in.{n}": torch.ones(2, 2) for n in names}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(LoraExportError, match=said):
        api.truncate(tmp_path / "x.safetensors", tmp_path / "out", RankOptions(rank=1))
    assert not (tmp_path / "out").exists()


# --- combine -----------------------------------------------------------------------------------------------


def test_combine_of_two_files_is_their_exact_sum(base: Path, tmp_path: Path) -> None:
    files = [kohya_file(tmp_path / "a.safetensors", 1), kohya_file(tmp_path / "b.safetensors", 2, (Q,))]
    made = api.combine([(files[0], 0.75), (files[1], -0.5)], tmp_path / "both")
    assert sorted(made.ranks.values()) == [2, 4] and made.error < 1e-6
    out = merged(base, tmp_path / "out", tmp_path / "both")
    wanted = 0.75 * delta_of(files[0], Q) - 0.5 * delta_of(files[1], Q)
    assert torch.allclose(added(base, out, Q), wanted, rtol=0, atol=1e-5)
    assert torch.allclose(added(base, out, "conv_in"), 0.75 * delta_of(files[0], "conv_in"), rtol=0, atol=1e-5)


def test_combine_of_files_of_other_names_is_refused(tmp_path: Path) -> None:
    tensors = {f"unet.{Q}.lora_{part}.weight": torch.ones(8, 8) for part in "AB"}
    save_file(tensors, tmp_path / "b.safetensors")
    files = [kohya_file(tmp_path / "a.safetensors", 1), tmp_path / "b.safetensors"]
    with pytest.raises(LoraExportError, match="spelled in different ways: diffusers, kohya"):
        api.combine(files, tmp_path / "both")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraExportError, match="single files of image models and PEFT folders together"):
        api.combine([files[0], tmp_path / "peft"], tmp_path / "both")


# --- what an adapter has learnt ----------------------------------------------------------------------------


def test_understand_of_file_has_norms_ranks_and_alphas(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "style.safetensors", 1)
    learnt = {m.type: m for m in api.understand(file).modules}
    assert set(learnt) == {"conv_in", "attn1_to_q"}
    for name, type_ in (("conv_in", "conv_in"), (Q, "attn1_to_q")):
        module, delta = learnt[type_], delta_of(file, name)
        assert module.norm == pytest.approx(float(delta.norm())) and (module.rank, module.alpha) == (2, 1.0)
        sizes = np.linalg.svd(delta.flatten(1).numpy(), compute_uv=False)
        assert module.singular_values == pytest.approx(tuple(sizes[:2]))


def test_understand_of_file_with_pipeline_has_sizes_relative_to_weights(base: Path, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "style.safetensors", 1)
    learnt = {m.name: m for m in api.understand(file, base).modules}
    assert set(learnt) == {"unet.conv_in.weight", f"unet.{Q}.weight"}
    weight = load_file(base / UNET)[f"{Q}.weight"].double()
    module = learnt[f"unet.{Q}.weight"]
    assert module.relative == pytest.approx(float(delta_of(file, Q).norm() / weight.norm())) and module.alpha == 1


# --- switch ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("part", ["", "unet"])
def test_switched_pipeline_is_byte_for_byte_fresh_merge(base: Path, tmp_path: Path, part: str) -> None:
    one, two = (kohya_file(tmp_path / f"{i}.safetensors", i) for i in (1, 2))
    fresh = merged(base / part, tmp_path / "fresh", two)
    model = merged(base / part, tmp_path / "model", one)
    assert contents(model) != contents(fresh)
    switched = api.switch(model, one, two, base / part)
    assert switched.tensors == 2 and contents(model) == contents(fresh)


def test_switch_refuses_other_adapter_other_base_and_missing_base(base: Path, tmp_path: Path) -> None:
    one, two = (kohya_file(tmp_path / f"{i}.safetensors", i) for i in (1, 2))
    model = merged(base, tmp_path / "model", one)
    before = contents(model)
    with pytest.raises(LoraExportError, match="not merged from the adapters of --from"):
        api.switch(model, two, one, base)
    with pytest.raises(LoraExportError, match="does not name its base"):
        api.switch(model, one, two)
    with pytest.raises(LoraExportError, match="is not the one that the pipeline was merged from"):
        api.switch(model, one, two, filled(tmp_path / "other", seed=5))
    assert contents(model) == before


# --- a single file where it has no place -------------------------------------------------------------------


def test_file_with_language_model_is_refused_in_words(base: Path, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "style.safetensors", 1)
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(LoraExportError, match="the base is no pipeline"):
        api.merge(tmp_path / "llm", file, tmp_path / "out")
    with pytest.raises(LoraExportError, match="of an image model, and the base is none"):
        api.understand(file, tmp_path / "llm")
    with pytest.raises(LoraExportError, match="the base is no pipeline"):
        api.verify(merged(base, tmp_path / "model", file), tmp_path / "llm", file)


def test_single_file_as_model_is_refused(base: Path, tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "style.safetensors", 1)
    for call in (
        lambda: api.merge(file, file, tmp_path / "out"),
        lambda: api.export(file, tmp_path / "out"),
        lambda: api.extract(base, file, tmp_path / "out", RankOptions(rank=1)),
    ):
        with pytest.raises(LoraExportError, match="this is a single file, and a model is a folder here"):
            call()


def test_verify_of_what_was_not_merged_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraExportError, match=r"there is no lora_export_certificate\.json here"):
        api.verify(base)
    with pytest.raises(LoraExportError, match="this file is no package"):
        api.verify(kohya_file(tmp_path / "style.safetensors", 1))
