"""Which engine makes an export: refusals, failures and wrong graphs give way to the next; the record says why."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file

from lora_export import registered
from lora_export.contracts import AdapterChoice, ExportOptions, MergeOptions, Proof
from lora_export.errors import CheckpointError, ExportError
from lora_export.merging import plan
from lora_export.onnx_export import export
from lora_export.onnx_export.engines.attempts import produce
from lora_export.onnx_export.engines.isolated import Worker
from lora_export.onnx_export.engines.protocol import Engine, ExportJob, Made
from lora_export.progress import Silent
from lora_export.workflows.fewer_layers import with_fewer_layers
from tests.onnx_export.conftest import save_llama

PROVEN = Proof(1, 1e-6, 1e-4, "batch 3", "logits", "PyTorch")


class Talk(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)


def engine(title: str, *, refuses: str = "", fails: str = "", fuses: bool = False) -> Engine:
    """An engine that writes a graph with its name and level of fusion in it."""

    class Made_(Engine):
        name: ClassVar[str] = title
        optimizes: ClassVar[bool] = fuses

        def exports(self, config: Mapping[str, Any]) -> bool:
            return True

        def check(self, job: ExportJob) -> None:
            if refuses:
                raise ExportError(refuses)

        def check_precision(self, precision: Any, provider: str) -> None: ...

        def generates(self, config: Mapping[str, Any]) -> bool:
            return True

        def run(self, job: ExportJob) -> Made:
            assert not list(job.output.iterdir()), "what another engine left"
            (job.output / "model.onnx").write_text(f"{title} {job.optimize}")
            if fails:
                raise ExportError(fails)
            return Made("decoder", "text-generation", ("model.onnx",), False)

        def accompany(self, model: Path, output: Path) -> None: ...

    return Made_()


def proven(*right: str) -> Callable[..., Proof]:
    """A proof that only these graphs pass."""

    def prove(chosen: Engine, job: ExportJob, made: Made, streamed: bool) -> Proof:
        graph = (job.output / "model.onnx").read_text()
        if graph not in right:
            raise ExportError(f"{graph} differs by 0.4")
        return PROVEN

    return prove


@pytest.fixture
def produced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    talk = Talk()

    def run(engines: list[Engine], prove: Any, named: str | None = None) -> Any:
        known = {e.name: e for e in engines}
        monkeypatch.setattr(registered, "registered", lambda *_: known)
        (tmp_path / "out").mkdir()
        with Worker() as worker:
            config = {"architectures": ["LlamaForCausalLM"]}
            job = ExportJob(tmp_path, config, tmp_path / "out", "fp32", "cpu", None, talk, worker)
            return produce(job, named, None, prove, False), talk.warned

    return run


def test_first_engine_with_proven_graph_is_taken(produced: Callable[..., Any]) -> None:
    found, warned = produced([engine("a"), engine("b")], proven("a full", "b full"))
    assert (found.engine.name, found.tried, warned) == ("a", (), [])


def test_engine_refusing_failing_or_wrong_gives_way(produced: Callable[..., Any]) -> None:
    engines = [engine("a", refuses="no tokenizer"), engine("b", fails="KeyError"), engine("c"), engine("d")]
    found, warned = produced(engines, proven("d full"))
    assert found.engine.name == "d" and found.proof == PROVEN
    assert [(t.engine, t.reason) for t in found.tried] == [
        ("a", "no tokenizer"), ("b", "KeyError"), ("c", "c full differs by 0.4"),
    ]  # fmt: skip
    assert warned == [f"d takes the place of {t.engine}: {t.reason}" for t in found.tried]


def test_wrong_fusion_gives_way_to_plain_graph(produced: Callable[..., Any]) -> None:
    found, _ = produced([engine("a", fuses=True), engine("b")], proven("a none", "b full"))
    assert (found.engine.name, found.job.optimize) == ("a", "none")
    assert found.tried[0].reason == "a full differs by 0.4"


def test_named_engine_is_the_only_one_tried(produced: Callable[..., Any]) -> None:
    with pytest.raises(ExportError, match=r"^a full differs by 0.4$|a full differs by 0.4\n"):
        produced([engine("a"), engine("b")], proven("b full"), "a")


def test_refusal_tells_those_that_got_furthest(produced: Callable[..., Any]) -> None:
    engines = [engine("a", refuses="no tokenizer"), engine("b", fails="KeyError"), engine("c")]
    with pytest.raises(ExportError) as refused:
        produced(engines, proven())
    assert refused.value.found == "c full differs by 0.4; a: no tokenizer; b: KeyError"


def test_refusal_of_checks_alone_is_the_first_ones(produced: Callable[..., Any]) -> None:
    with pytest.raises(ExportError) as refused:
        produced([engine("a", refuses="bf16 on the CPU"), engine("b", refuses="no adapter")], proven())
    assert refused.value.found == "bf16 on the CPU"


# --- weights that are missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_weight_is_refused_by_name(gone: str, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", 0, tied=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for refuse in (
        lambda: export(folder, tmp_path / "onnx", ExportOptions("fp32", "cpu"), progress=Silent()),
        lambda: plan(folder, list[AdapterChoice](), MergeOptions()),
    ):
        with pytest.raises(CheckpointError, match="at random") as refused:
            refuse()
        assert refused.value.tensor == gone
    assert not (tmp_path / "onnx").exists()


# --- fewer layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"num_hidden_layers": 8}, 2),
        ({"num_hidden_layers": 6, "layer_types": ["sliding"] * 3 + ["full"] + ["sliding"] * 2}, 4),
        ({"text_config": {"num_hidden_layers": 9, "sliding_window_pattern": 3}}, 3),
    ],
)
def test_fewer_layers_have_one_of_each_kind(settings: dict[str, Any], layers: int, tmp_path: Path) -> None:
    model, folder = tmp_path / "model", tmp_path / "short"
    model.mkdir()
    folder.mkdir()
    (model / "config.json").write_text(json.dumps({"vocab_size": 100, **settings}))
    (model / "model.safetensors").write_bytes(b"weights")
    assert with_fewer_layers(model, folder) == layers
    config = json.loads((folder / "config.json").read_text())
    part = config.get("text_config", config)
    assert part["num_hidden_layers"] == layers and config["vocab_size"] == 100
    assert len(part.get("layer_types", range(layers))) == layers
    assert (folder / "model.safetensors").read_bytes() == b"weights"
