"""What is known of a base is used where it belongs, and changes no figure and no verdict."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_export.contracts import AdapterChoice, ExportedPair, ExportOptions, ValidationOptions, ValidationResult
from lora_export.merging import merge
from lora_export.onnx_export import export, reweight
from lora_export.progress import Silent
from lora_export.validation import validate
from lora_export.validation.comparing import decoder
from lora_export.validation.known import Answers, KnownBase
from lora_export.validation.prints import digest
from tests.builders import edit_tensors, lora, save_adapter
from tests.daily import daily
from tests.onnx_export.architectures import DYNAMO, GENAI, save
from tests.onnx_export.architectures import save_adapter as save_adapter_of
from tests.validation.conftest import save_base

TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: lora(target_modules=TARGETS),
    "dora": lambda: lora(target_modules=TARGETS, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "bias": lambda: lora(target_modules=TARGETS, bias="all"),
    "saved": lambda: lora(target_modules=TARGETS, modules_to_save=["norm"]),
    "pissa": lambda: lora(target_modules=TARGETS, init_lora_weights="pissa"),
}


class Counted(Silent):
    """Keeps what it is warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@dataclass
class Shop:
    """A base with adapters of several kinds, their merges, and all exported with one graph."""

    root: Path
    base: Path
    taken: list[str] = field(default_factory=list)

    def adapter(self, kind: str) -> Path:
        folder = self.root / f"adapter-{kind}"
        return folder if folder.exists() else save_adapter(folder, self.base, KINDS[kind](), scale=0.1)

    def merged(self, kind: str) -> Path:
        folder = self.root / f"merged-{kind}"
        if not folder.exists():
            merge(self.base, [AdapterChoice(self.adapter(kind))], folder)
        return folder

    def pair(self, kind: str, precision: Any = "fp32") -> ExportedPair:
        plain, onnx = self.root / f"base-{precision}", self.root / f"onnx-{precision}-{kind}"
        if not plain.exists():
            export(self.base, plain, ExportOptions(precision, "cpu"), progress=Silent())
        if not onnx.exists():
            reweight(plain, self.merged(kind), onnx, progress=Silent())
        return ExportedPair(onnx, plain, precision, 1)

    def judged(
        self, kind: str, known: KnownBase | None = None, pair: ExportedPair | None = None,
        merged: Path | None = None, alone: bool = False, progress: Any = None, **options: Any,
    ) -> ValidationResult:  # fmt: skip
        settings = ValidationOptions(**{"provider": "cpu", "seed": 3} | options)
        return validate(
            self.base, [AdapterChoice(self.adapter(kind))], merged or self.merged(kind),
            exports=[pair or self.pair(kind)], graphs_alone=alone, options=settings, known=known,
            progress=progress or Silent(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    root = tmp_path_factory.mktemp("known")
    return Shop(root, save_base(root / "base", torch.bfloat16))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was computed anew, and with a plus in front what was known."""
    seen: list[str] = []
    original = Answers.take

    def take(self: Answers, what: str, inputs: Any, compute: Any) -> Any:
        before = len(self.taken)
        value = original(self, what, inputs, compute)
        seen.append(f"+{what}" if len(self.taken) > before else what)
        return value

    monkeypatch.setattr(Answers, "take", take)
    yield seen


def known_of(taken: Sequence[str]) -> set[str]:
    return {what for what in taken if what.startswith("+")}


ALL = {"+outputs", "+text", "+greedy texts", "+graph of the base"}


@pytest.mark.parametrize("kinds", daily(("dora lora", "lora dora ia3 lora"), ("dora lora",)))
def test_validate_next_adapter_of_another_kind_has_the_figures_of_a_fresh_validation(
    shop: Shop, tmp_path: Path, kinds: str, taken: list[str]
) -> None:
    known = KnownBase(tmp_path / "known")
    first, *others = kinds.split()
    shop.judged(first, known)
    for kind in others:
        taken.clear()
        warm = shop.judged(kind, known)
        assert known_of(taken) == ALL
        assert dataclasses.asdict(warm) == dataclasses.asdict(shop.judged(kind)), kind


@pytest.mark.parametrize("kind", daily(("bias", "saved", "pissa"), ()))
def test_validate_kinds_that_change_the_base_have_answers_of_their_own(
    shop: Shop, tmp_path: Path, kind: str
) -> None:
    known = KnownBase(tmp_path / "known")
    shop.judged("lora", known)
    for name in (kind, "lora"):
        assert dataclasses.asdict(shop.judged(name, known)) == dataclasses.asdict(shop.judged(name)), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_validate_in_low_precision_has_the_figures_of_a_fresh_validation(
    shop: Shop, tmp_path: Path, precision: str, taken: list[str]
) -> None:
    known = KnownBase(tmp_path / "known")
    shop.judged("dora", known, shop.pair("dora", precision), min_survival=0.0)
    taken.clear()
    alone = {"pair": shop.pair("lora", precision), "min_survival": 0.0}
    warm = shop.judged("lora", known, **alone)
    assert known_of(taken) == ALL
    assert dataclasses.asdict(warm) == dataclasses.asdict(shop.judged("lora", **alone))


def other_base(shop: Shop, root: Path) -> Shop:
    folder = Path(shutil.copytree(shop.base, root / "other"))
    edit_tensors(folder / "model.safetensors", {"model.norm.weight": torch.full((64,), 1.25, dtype=torch.bfloat16)})
    return Shop(root, folder)


@pytest.mark.slow
def test_validate_answers_of_another_base_seed_text_or_graph_are_not_used(
    shop: Shop, tmp_path: Path, taken: list[str]
) -> None:
    known = KnownBase(tmp_path / "known")
    shop.judged("lora", known)
    text = tmp_path / "text.txt"
    text.write_text("Another text, long enough for a perplexity of its own. " * 3)
    other = other_base(shop, tmp_path)
    graph = Path(shutil.copytree(shop.pair("lora").base, tmp_path / "graph"))
    (graph / "added.txt").write_text("any file of the folder")
    for named, changed, apart in (
        ("base", lambda k: other.judged("lora", k), ALL),
        ("seed", lambda k: shop.judged("lora", k, seed=4), ALL),
        ("text", lambda k: shop.judged("lora", k, text=text), ALL),
        ("graph", lambda k: shop.judged("lora", k, dataclasses.replace(shop.pair("lora"), base=graph)),
         {"+graph of the base"}),
    ):  # fmt: skip
        taken.clear()
        warm = changed(known)
        assert known_of(taken) == ALL - apart, named
        assert dataclasses.asdict(warm) == dataclasses.asdict(changed(None)), named


@pytest.mark.slow
def test_validate_answers_that_the_base_here_does_not_give_are_not_used(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[str]
) -> None:
    """As on another processor whose kernels add in another order, which its name does not tell."""
    known = KnownBase(tmp_path / "known")
    shop.judged("lora", known)
    plain = decoder.logits

    def otherwise(model: Any, tokens: Any) -> Any:
        return (x * (1 + 2.0**-22) for x in plain(model, tokens))

    monkeypatch.setattr(decoder, "logits", otherwise)
    taken.clear()
    warm = shop.judged("lora", known)
    assert known_of(taken) == {"+outputs"}  # of which the first was compared
    assert dataclasses.asdict(warm) == dataclasses.asdict(shop.judged("lora"))


@pytest.mark.slow
def test_validate_damaged_answers_are_computed_again_with_a_warning(
    shop: Shop, tmp_path: Path, taken: list[str]
) -> None:
    first = shop.judged("lora", KnownBase(tmp_path / "known"))
    files = sorted((tmp_path / "known").rglob("0.npy"))
    assert len(files) == 4
    for file in files:
        values = np.load(file)
        values.reshape(-1)[0] += 1
        np.save(file, values)
    taken.clear()
    progress = Counted()
    assert shop.judged("lora", KnownBase(tmp_path / "known"), progress=progress) == first
    assert not known_of(taken)
    assert sum("damaged" in words for words in progress.warnings) == 4
    taken.clear()
    shop.judged("lora", KnownBase(tmp_path / "known"))
    assert known_of(taken) == ALL


@pytest.mark.slow
def test_validate_answers_beyond_the_limit_are_not_kept(shop: Shop, tmp_path: Path, taken: list[str]) -> None:
    known = KnownBase(tmp_path / "known", most_bytes=100)
    first = shop.judged("lora", known)
    assert shop.judged("lora", known) == first
    assert not known_of(taken)
    assert not list((tmp_path / "known").iterdir())


def scaled(folder: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    value = load_file(folder / "model.safetensors")[name]
    edit_tensors(folder / "model.safetensors", {name: (value.float() * 1.02).to(value.dtype)})


def names_of_failed(result: ValidationResult) -> set[str]:
    return {c.name for c in result.checks if not c.passed}


@pytest.mark.slow
def test_validate_faulty_merge_fails_alike_with_what_is_known(shop: Shop, tmp_path: Path, taken: list[str]) -> None:
    known = KnownBase(tmp_path / "known")
    shop.judged("dora", known)
    spoiled = Path(shutil.copytree(shop.merged("lora"), tmp_path / "merged"))
    scaled(spoiled)
    taken.clear()
    warm = shop.judged("lora", known, merged=spoiled)
    assert known_of(taken) == ALL
    assert "tensor_errors" in names_of_failed(warm)
    assert dataclasses.asdict(warm) == dataclasses.asdict(shop.judged("lora", merged=spoiled))


def of_the_base(pair: ExportedPair, root: Path) -> ExportedPair:
    """The base's numbers in the place of the merged ones."""
    return dataclasses.replace(pair, merged=pair.base)


def scaled_data(pair: ExportedPair, root: Path) -> ExportedPair:
    """Numbers of one tensor changed in the merged model's data."""
    folder = Path(shutil.copytree(pair.merged, root / "spoiled"))
    data = np.memmap(folder / "model.onnx.data", np.float32, "r+")
    data[-5000:] *= 1.05
    data.flush()
    return dataclasses.replace(pair, merged=folder)


def epsilon(pair: ExportedPair, root: Path) -> ExportedPair:
    """One attribute of the graphs of both, which share it."""
    folders = []
    for folder in (pair.merged, pair.base):
        folders.append(Path(shutil.copytree(folder, root / f"spoiled-{folder.name}")))
        model = onnx.load(str(folders[-1] / "model.onnx"), load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 0.05
        onnx.save(model, str(folders[-1] / "model.onnx"))
    return dataclasses.replace(pair, merged=folders[0], base=folders[1])


@pytest.mark.parametrize("alone", daily((False, True), (False,)))
@pytest.mark.parametrize("fault", daily((of_the_base, scaled_data, epsilon), (epsilon,)))
def test_validate_faulty_graph_fails_alike_with_what_is_known(
    shop: Shop, tmp_path: Path, fault: Callable[[ExportedPair, Path], ExportedPair], alone: bool
) -> None:
    known = KnownBase(tmp_path / "known")
    shop.judged("dora", known)
    pair = fault(shop.pair("lora"), tmp_path)
    warm, fresh = (shop.judged("lora", k, pair, alone=alone) for k in (known, None))
    assert any(name.startswith("onnx_") for name in names_of_failed(warm))
    assert dataclasses.asdict(warm) == dataclasses.asdict(fresh)


ARCHITECTURES = ("BertForQuestionAnswering", "MarianMTModel", "ViTForImageClassification", "CLIPModel")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_validate_second_time_of_every_kind_of_model_has_the_same_figures(
    name: str, tmp_path: Path, taken: list[str]
) -> None:
    architecture = (DYNAMO | GENAI)[name]
    base = save(architecture, tmp_path / "base")
    save_adapter_of(architecture, base, tmp_path / "adapter")
    adapters = [AdapterChoice(tmp_path / "adapter")]
    merge(base, adapters, tmp_path / "merged")
    plain = export(base, tmp_path / "base-onnx", ExportOptions("fp32", "cpu"), progress=Silent())
    onnx = reweight(plain.output, tmp_path / "merged", tmp_path / "onnx", progress=Silent())
    pair = ExportedPair(onnx.output, plain.output, "fp32", 1, graphs=onnx.graphs)
    options = ValidationOptions(provider="cpu", seed=3)

    def judged(known: KnownBase | None) -> ValidationResult:
        return validate(
            base, adapters, tmp_path / "merged", exports=[pair], options=options, known=known, progress=Silent()
        )

    known = KnownBase(tmp_path / "known")
    first = judged(known)
    taken.clear()
    second = judged(known)
    assert {"+outputs", "+graph of the base"} <= known_of(taken)
    assert dataclasses.asdict(first) == dataclasses.asdict(second) == dataclasses.asdict(judged(None))


# --- greedy texts that one forward proves ---------------------------------------------------------------------


class Steps:
    """Stands for a model whose next token is its input plus one; `unsure` makes two tokens equally likely there."""

    def __init__(self, unsure: int = -1) -> None:
        self.unsure, self.calls = unsure, 0

    def forward(self, input_ids: torch.Tensor) -> Any:
        self.calls += 1
        logits = torch.nn.functional.one_hot(input_ids + 1, 100).float() * 8
        logits[input_ids == self.unsure] = (
            logits[input_ids == self.unsure].roll(1, -1) * (1 + 1e-6) + (logits[input_ids == self.unsure])
        )
        return type("Output", (), {"logits": logits})

    __call__ = forward


@pytest.mark.parametrize(
    ("draft", "unsure", "calls"),
    [
        ([4, 5, 6, 7], -1, 1),  # all of it
        ([4, 5, 9, 9], -1, 4),  # two of it: two steps, and the forward for the logits
        ([9, 9, 9, 9], -1, 6),
        ([4, 5, 7, 8], 5, 4),  # the third is right and not sure, so it is written
    ],
)
def test_written_takes_of_a_draft_what_is_surely_the_models_own(draft: list[int], unsure: int, calls: int) -> None:
    plain = decoder.greedy(Steps(unsure), torch.tensor([1, 2, 3]), 4)
    model = Steps(unsure)
    text = decoder.written(model, torch.tensor([1, 2, 3]), 4, torch.tensor(draft))
    assert torch.equal(text.tokens, plain)
    assert text.logits.shape == (4, 100)
    assert model.calls == calls


def test_digest_anything_changed_is_another() -> None:
    given: dict[str, Any] = {"ids": [torch.tensor([1, 2])], "type": torch.float32, "text": "a", "set": {"b", "c"}}
    others = [
        {**given, "ids": [torch.tensor([1, 3])]},
        {**given, "ids": [torch.tensor([1, 2]).view(torch.float64)]},  # the same bytes
        {**given, "ids": [torch.tensor([[1, 2]])]},
        {**given, "type": torch.float16},
        {**given, "text": "b"},
        {**given, "set": {"b"}},
    ]
    assert len({digest(x) for x in (given, *others)}) == 7
    assert digest(given) == digest({**given, "set": {"c", "b"}})
