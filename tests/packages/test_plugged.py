"""An installed package that brings an adapter kind, a base format, an engine and a target: the commands use all."""

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from lora_export.adapters.registry import KINDS_GROUP
from lora_export.commands.main import cli
from lora_export.errors import InputError
from lora_export.onnx_export.engines import engines
from lora_export.packages.targets import targets
from lora_export.quantization.registry import GROUP as FORMATS_GROUP
from lora_export.registered import ENGINES, TARGETS
from tests.adapters.test_plugged_kinds import SHIFT, save_shift
from tests.plugged import installed
from tests.quantization.test_plugged_formats import HALVES, WEIGHT, save_halves

ENGINE = f'''
import onnx

from lora_export.onnx_export.engines.protocol import Engine, Made
from lora_export.onnx_export.weights import map as weights_map
from lora_export.onnx_export.weights.map import Piece, Recipe, Weight, WeightsMap


class OneMatrix(Engine):
    """The graph of one weight alone: y = x · Wᵀ."""

    name = "one_matrix"
    comparable = False
    architectures = frozenset({{"LlamaForCausalLM"}})

    def check(self, job):
        self.check_precision(job.precision, job.provider)

    def check_precision(self, precision, provider):
        assert precision == "fp32"

    def generates(self, config):
        return False

    def run(self, job):
        recipe = Recipe((Piece("{WEIGHT}", 0, 48),), transposed=True)
        weight = Weight("W", "model.onnx.data", "float32", (48, 48), recipe)
        weights_map.write(job.output, WeightsMap((weight,)))
        with (job.output / "model.onnx.data").open("xb") as data:
            data.truncate(weight.nbytes)
        value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, 48])
        initializer = onnx.TensorProto(name="W", data_type=onnx.TensorProto.FLOAT, dims=(48, 48), data_location=1)
        for key, text in (("location", "model.onnx.data"), ("offset", "0"), ("length", str(weight.nbytes))):
            initializer.external_data.add(key=key, value=text)
        product = onnx.helper.make_node("MatMul", ["x", "W"], ["y"])
        graph = onnx.helper.make_graph([product], "g", [value("x")], [value("y")], [initializer])
        opset = onnx.helper.make_opsetid("", 21)
        (job.output / "model.onnx").write_bytes(
            onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
        )
        return Made("encoder", "feature-extraction", ("model.onnx",), True)


ENGINE = OneMatrix()
'''
TARGET = """
from lora_export.packages import companions
from lora_export.packages.interpreters import Python
from lora_export.packages.job import PackageTarget, Snippet


class Tiny(PackageTarget):
    name = "tiny"
    title = "the tiny runtime"
    file_names = ("*.tiny",)

    def lay(self, job):
        companions.lay(job.run, job.stage)
        (job.stage / "model.tiny").write_text("weights")

    def snippet(self, facts, folder):
        code = f"import json\\nprint(json.dumps({list(facts.sample.numbers)}))"
        return Snippet(Python(), "pip install tiny", code)


TARGET = Tiny()
"""
ALL_FOUR = {
    KINDS_GROUP: {"shift": "tiny_plugin"},
    FORMATS_GROUP: {"halves": "tiny_plugin"},
    ENGINES: {"one_matrix": ":ENGINE"},
    TARGETS: {"tiny": ":TARGET"},
}


def run(*words: object) -> Result:
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert "internal error" not in result.output, result.output
    return result


def test_commands_use_all_plugins_of_installed_package(tmp_path: Path, encoder_run: Path) -> None:
    base, adapter, merged, exported, package = (
        tmp_path / n for n in ("base", "adapter", "merged", "exported", "package")
    )
    doubled = save_halves(base, {"quant_method": "halves"})
    shift = save_shift(adapter, {"peft_type": "SHIFT"})
    with installed(tmp_path / "site", SHIFT + HALVES + ENGINE + TARGET, ALL_FOUR):
        assert "|one_matrix]" in CliRunner().invoke(cli, ["export", "--help"]).output
        assert run("merge", "-b", base, "-a", adapter, "-o", merged, "--dtype", "float32").exit_code == 0
        result = run("export", "-m", merged, "-o", exported, "--engine", "one_matrix", "--provider", "cpu")
        assert result.exit_code == 0, result.output
        assert run("package", encoder_run, "--for", "tiny", "-o", package).exit_code == 0
        assert run("verify", package, "--run").exit_code == 0
        (package / "model.so").write_bytes(b"\x7fELF")  # of no type that this target brings
        assert "model.so" in run("verify", package).output
        (package / "model.so").unlink()

    weight = load_file(merged / "model.safetensors")[WEIGHT]
    torch.testing.assert_close(weight, doubled / 2 + shift[:, None])
    x = torch.randn(3, 48)
    (y,) = onnxruntime.InferenceSession(exported / "model.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), x @ weight.T)
    assert json.loads((exported / "export.json").read_text())["engine"] == "one_matrix"
    assert "for the tiny runtime\n" in (package / "README.md").read_text()

    refused = run("verify", package)  # where the package is not installed
    assert refused.exit_code == 1 and "no target 'tiny' is installed" in refused.output
    assert run("package", encoder_run, "--for", "tiny", "-o", package).exit_code == 2


@pytest.mark.parametrize(
    ("point", "told"),
    [
        ({ENGINES: {"one_matrix": ":OneMatrix"}}, "is ABCMeta"),
        ({ENGINES: {"other": ":ENGINE"}}, "is called 'one_matrix'"),
        ({ENGINES: {"genai": ":ENGINE"}}, "is called 'one_matrix'"),
        ({TARGETS: {"tiny": ":ENGINE"}}, "is OneMatrix"),
    ],
)
def test_plugged_engine_or_target_unusable_is_refused(
    tmp_path: Path, point: dict[str, dict[str, str]], told: str
) -> None:
    with installed(tmp_path / "site", ENGINE, point), pytest.raises(InputError, match="tiny_plugin 1.2 " + told):
        engines() if ENGINES in point else targets()


def test_reweight_engine_not_installed_is_named(tmp_path: Path) -> None:
    from lora_export.onnx_export.engines import engine_named

    with pytest.raises(InputError, match="made by the engine 'one_matrix', which is not installed"):
        engine_named("one_matrix")
