"""A base that stays in memory is used again only if the last adapter left nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lora_export.contracts import AdapterChoice, MergeOptions
from lora_export.validation.comparing.decoder import logits
from lora_export.validation.reference.kept import KeptBase
from lora_export.validation.reference.unmerged import load_unmerged
from tests.builders import lora, save_adapter
from tests.validation.conftest import save_base
from tests.validation.test_known import KINDS

IDS = [torch.arange(3, 40)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("kept") / "base", torch.bfloat16)


class Worker:
    """Attaches adapters of several kinds to one base, one after another."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder, self.kept = base, folder, KeptBase(folder / "weights")

    def load(self, kind: str, kept: KeptBase | None = None) -> Any:
        folder = self.folder / kind
        if not folder.exists():
            save_adapter(folder, self.base, KINDS[kind](), scale=0.1)
        self.unmerged = load_unmerged(
            self.base, [AdapterChoice(folder)], MergeOptions(), kept=kept or self.kept
        ).model
        return self.unmerged.base_model.model

    def same_as_fresh(self, kind: str) -> bool:
        unmerged = self.load(kind), self.load(kind, KeptBase(keeps=False))
        return torch.equal(*(next(iter(logits(model, IDS))) for model in unmerged))


@pytest.fixture
def worker(base: Path, tmp_path: Path) -> Worker:
    return Worker(base, tmp_path)


def test_load_unmerged_base_stays_under_adapters_of_many_kinds(worker: Worker) -> None:
    first = worker.load("lora")
    for kind in ("dora", "ia3", "lora"):
        assert worker.load(kind) is first, kind
        assert not isinstance(first.model.norm, peft.utils.ModulesToSaveWrapper)
        assert worker.same_as_fresh(kind), kind


@pytest.mark.parametrize("kind", ["bias", "pissa", "saved"])
def test_load_unmerged_after_kinds_that_change_the_base_is_the_base(worker: Worker, kind: str) -> None:
    worker.load("lora")
    assert worker.same_as_fresh(kind)
    assert worker.same_as_fresh("lora")


def changed_byte(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] += 2.0**-20


def hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)


def attribute(model: Any) -> None:
    model.model.layers[0].left = True


def module(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)


def forward(model: Any) -> None:
    model.model.norm.forward = lambda x: x


@pytest.mark.parametrize("change", [changed_byte, hook, attribute, module, forward])
def test_load_unmerged_something_left_behind_loads_anew(worker: Worker, change: Callable[[Any], None]) -> None:
    first = worker.load("lora")
    change(first)
    assert worker.load("dora") is not first
    assert worker.same_as_fresh("lora")


def test_load_unmerged_another_file_of_the_base_loads_anew(tmp_path: Path) -> None:
    worker = Worker(save_base(tmp_path / "base", torch.bfloat16), tmp_path)
    first = worker.load("lora")
    file = worker.base / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert worker.load("lora") is not first


def test_load_unmerged_weights_are_a_file_that_processes_share(worker: Worker, tmp_path: Path) -> None:
    first = worker.load("lora")
    (file,) = (tmp_path / "weights").iterdir()
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else str(file)
    assert str(file) in maps
    before = next(iter(logits(first, IDS)))
    worker.kept.rest(worker.kept._print)  # read again from the file
    assert torch.equal(next(iter(logits(first, IDS))), before)


def test_load_unmerged_damaged_file_of_weights_is_not_used(worker: Worker, tmp_path: Path) -> None:
    worker.load("lora")
    (file,) = (tmp_path / "weights").iterdir()
    data = bytearray(file.read_bytes())
    data[-200] ^= 255
    worker.kept.forget()
    file.unlink()
    file.write_bytes(data)
    assert worker.same_as_fresh("lora")
    assert not file.exists()


def test_forget_leaves_nothing_in_memory(worker: Worker) -> None:
    first = worker.load("lora")
    worker.kept.forget()
    assert worker.load("lora") is not first


def test_load_unmerged_rank_of_an_adapter_that_does_not_fit_leaves_the_base_usable(worker: Worker) -> None:
    first = worker.load("lora")
    folder = save_adapter(worker.folder / "wide", worker.base, lora(rank=3, target_modules=["q_proj"]))
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace('"r": 3', '"r": 4')
    )
    with pytest.raises(Exception, match="PEFT cannot load the adapter"):
        load_unmerged(worker.base, [AdapterChoice(folder)], MergeOptions(), kept=worker.kept)
    assert worker.same_as_fresh("dora")
    assert first is not None
