"""The options of the merge that validate takes: the certificate's, which no stated option may contradict."""

from pathlib import Path

import pytest
from peft import LoraConfig

from lora_export import validate
from lora_export.commands.words import validation_words
from lora_export.contracts import AdapterChoice, MergeOptions, ValidationOptions
from lora_export.errors import InputError
from lora_export.merging import CERTIFICATE, merge
from lora_export.workflows.validating import merged_with
from tests.builders import save_adapter, save_base

Scene = tuple[Path, Path, list[AdapterChoice]]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """merged, base, adapters: merged in float16."""
    folder = tmp_path_factory.mktemp("merged-with")
    base = save_base(folder / "base")
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapters = [AdapterChoice(save_adapter(folder / "adapter", base, config))]
    merge(base, adapters, folder / "merged", MergeOptions(dtype="float16", max_memory=10**8))
    return folder / "merged", base, adapters


def options(stated: tuple[str, ...] | None = None, **given: object) -> ValidationOptions:
    return ValidationOptions(merge=MergeOptions(**given), stated=stated)  # type: ignore[arg-type]


def test_merged_with_takes_options_from_certificate(scene: Scene) -> None:
    recorded = merged_with(*scene, options(max_memory=5 * 10**8))
    assert recorded == MergeOptions(dtype="float16", max_memory=5 * 10**8)
    assert merged_with(*scene, options(dtype="float16")).dtype == "float16"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (options(dtype="float32"), "--dtype float32, but the folder was merged with float16"),
        (options(("dtype",)), "--dtype keep, but the folder was merged with float16"),  # stated at its default
        (options(("combine",), combine="linear"), "--combine linear, but the folder was merged with none"),
    ],
)
def test_merged_with_contradicting_option_is_refused(scene: Scene, given: ValidationOptions, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        merged_with(*scene, given)
    assert caught.value.where == str(scene[0] / CERTIFICATE)


def test_merged_with_option_without_effect_is_accepted(scene: Scene) -> None:
    """A certificate has the defaults of options that made no difference, whatever was given to the merge."""
    assert not merged_with(*scene, options(("training_double_quant",), training_double_quant=True)).seed
    assert merged_with(*scene, options((), dtype="float32")).dtype == "float16"  # set by a variable


def test_merged_with_no_certificate_takes_given_options(scene: Scene, tmp_path: Path) -> None:
    given = options(base_weights="original")
    assert merged_with(tmp_path, *scene[1:], given) == given.merge


def test_validate_names_options_only_certificate_states(scene: Scene) -> None:
    merged, base, adapters = scene
    result = validate(base, adapters, merged, options=ValidationOptions(seed=1))
    assert result.merge_options == ("dtype float16",)
    assert "merged with dtype float16, according to its certificate" in validation_words(result)
    assert not validate(base, adapters, merged, options=options(dtype="float16")).merge_options
