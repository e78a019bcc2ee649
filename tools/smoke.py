"""An installed lora-export, outside of any checkout: its command merges and verifies; its data files are there.

make smoke      # builds wheel and sdist, installs the wheel into a clean environment, and runs this in it
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path


def run(*words: str) -> str:
    executable = Path(sys.executable).with_name("lora-export")
    return subprocess.run([str(executable), *words], check=True, capture_output=True, text=True).stdout


def save_pair(folder: Path) -> None:
    """A tiny Llama and a LoRA of it, as transformers and PEFT save them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "adapter")


def main() -> None:
    import lora_export

    where = Path(lora_export.__file__)
    assert "site-packages" in where.parts, f"this is a checkout, and no installed package: {where}"
    assert run("--version").strip() == f"lora-export {lora_export.__version__}"
    package = files("lora_export")
    for name in ("py.typed", "report/templates", "validation/texts"):
        assert package.joinpath(name).is_file() or any(package.joinpath(name).iterdir()), name
    assert any(p["works"] for p in json.loads(run("env", "--json"))["providers"])
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        save_pair(Path(work))
        merged = json.loads(run("merge", "-b", "base", "-a", "adapter", "-o", "merged", "--json"))
        assert merged["tensors"]["updated"] == 1 and merged["adapter_tensors"] == {"used": 2, "total": 2}
        assert json.loads(run("verify", "merged", "-b", "base", "-a", "adapter", "--json"))["verified"]
        os.chdir("/")
    print(f"lora-export {lora_export.__version__} from its wheel: merged and verified")


if __name__ == "__main__":
    main()
