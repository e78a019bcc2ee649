"""What `inspect` says of an adapter of each kind, and of its fit to a base."""

from pathlib import Path

import pytest

from lora_export.workflows.inspection import inspect_folder
from tests.builders import llama_config, save_base
from tests.daily import daily
from tests.matrix.families import FAMILIES
from tests.matrix.rare import RARE
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
    "miss": ("MiSS adapter of rank 5 on", {"rank": 5, "scaling": None}),
    "miss bat": ("MiSS adapter of rank 4 on", {"kinds": {"miss_bat": 14}}),
    "hra": ("HRA adapter of rank 3 on", {"rank": 3}),
    "fourierft": ("FourierFT adapter on", {"rank": None}),
    "vblora short": ("VB-LoRA adapter of rank 3 on", {"rank": 3}),
    "randlora regenerated": ("RandLoRA adapter of rank 5 on", {"alpha": 10, "scaling": "alpha/rank"}),
    "road": ("RoAd adapter on", {"rank": None}),
    "shira": ("SHiRA adapter on", {}),
    "c3a": ("C3A adapter on", {}),
    "waveft": ("WaveFT adapter on", {}),
    "delora": ("DeLoRA adapter of rank 3, 4 on", {"ranks": {"3": 7, "4": 7}}),
    "gralora hybrid": (
        "GraLoRA adapter of rank 8 on",
        {"rank": 8, "alpha": 10, "scaling": "alpha/(rank + hybrid rank)"},
    ),
    "tokens": ("trainable tokens adapter on embed_tokens", {}),
}


@pytest.mark.parametrize(
    "kind", daily(WORDS, [k for k in WORDS if k not in RARE or k in ("hra", "delora", "miss bat")])
)
def test_inspection_words_describe_adapter(kind: str, tmp_path: Path) -> None:
    family = FAMILIES["mixtral" if "experts" in kind else "llama"]
    base = family.save(tmp_path / "base")
    train(base, family, kind, tmp_path / "adapter")
    told = inspect_folder(tmp_path / "adapter", base)
    start, figures = WORDS[kind]
    assert told["summary"].replace("ranks 2 to 5", "rank 2, 3, 4, 5").startswith(start), told["summary"]
    assert {k: told[k] for k in figures} == figures
    assert told["mergeable"] and told["fits_base"] and sum(told["kinds"].values()) > 0
    if kind in ("fourierft", "waveft"):
        return  # nothing in the file tells the sizes
    other = save_base(tmp_path / "other", config=llama_config(hidden_size=32, intermediate_size=40))
    misfit = inspect_folder(tmp_path / "adapter", other)
    assert misfit["fits_base"] is False and misfit["why_not"]
