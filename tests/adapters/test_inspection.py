"""What `inspect` says of an adapter of each kind, and of its fit to a base."""

from pathlib import Path

import pytest

from lora_export.workflows.inspection import inspect_folder
from tests.builders import llama_config, save_base
from tests.matrix.families import FAMILIES
from tests.matrix.test_matrix import train

WORDS = {
    "lora": ("LoRA adapter of rank 4 on", {"rank": 4, "alpha": 10, "scaling": "alpha/rank"}),
    "lora rslora": ("LoRA adapter of rank 4 on", {"scaling": "alpha/√rank"}),
    "lora patterns": ("LoRA adapter of rank 2, 3, 4, 5 on", {}),
    "lora experts": ("LoRA adapter of rank 4 on", {}),
    "dora": ("DoRA adapter of rank 4 on", {"ranks": {"4": 14}}),
    "adalora pruned": ("AdaLoRA adapter of rank", {"rank": 6, "scaling": "alpha/(initial rank + 1e-5)"}),
    "ia3": ("IA3 adapter on", {"rank": None, "scaling": None}),
    "loha": ("LoHa adapter on", {"rank": 4, "alpha": 10}),
    "lokr": ("LoKr adapter on", {"alpha": 10}),
    "vera": ("VeRA adapter on", {"rank": 6, "scaling": None}),
    "oft": ("OFT adapter on", {"scaling": None}),
    "boft": ("BOFT adapter on", {}),
    "tokens": ("trainable tokens adapter on embed_tokens", {}),
}


@pytest.mark.parametrize("kind", WORDS)
def test_words(kind: str, tmp_path: Path) -> None:
    family = FAMILIES["mixtral" if "experts" in kind else "llama"]
    base = family.save(tmp_path / "base")
    train(base, family, kind, tmp_path / "adapter")
    told = inspect_folder(tmp_path / "adapter", base)
    start, figures = WORDS[kind]
    assert told["summary"].replace("ranks 2 to 5", "rank 2, 3, 4, 5").startswith(start), told["summary"]
    assert {k: told[k] for k in figures} == figures
    assert told["mergeable"] and told["fits_base"] and sum(told["kinds"].values()) > 0
    other = save_base(tmp_path / "other", config=llama_config(hidden_size=32, intermediate_size=40))
    misfit = inspect_folder(tmp_path / "adapter", other)
    assert misfit["fits_base"] is False and misfit["why_not"]
