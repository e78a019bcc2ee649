"""The adapter files that a merge is tried on: family, naming, and what is trained."""

from dataclasses import dataclass

import torch

from tests.diffusion.files import Family, Plan

HALF, BRAIN = torch.float16, torch.bfloat16
MIXED = {"ranks": (4, 8, 2, 5), "alphas": (2.0, 1.0, 4.0, 0.5)}
SOME_ALPHAS = {"ranks": (4, 2), "alphas": (2.0, None, 1.0)}
_FACTORINGS = ("lokr", "lokr_w2_split", "lokr_w1_split", "lokr_both_split", "lokr_tucker", "lokr_tucker_w1_split")


@dataclass(frozen=True)
class Case:
    family: Family
    naming: str
    plan: Plan


def _case(family: Family, naming: str, *kinds: str, **more: object) -> Case:
    return Case(family, naming, Plan(kinds=kinds or ("lora",), **more))  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    # SD 1.5
    "sd15 kohya": _case("sd15", "kohya"),
    "sd15 kohya, mixed ranks and alphas": _case("sd15", "kohya", **MIXED, dtype=HALF),
    "sd15 kohya, alpha missing in some": _case("sd15", "kohya", **SOME_ALPHAS),
    "sd15 kohya, half of the modules, zeros": _case("sd15", "kohya", every=2, zeros=5, dtype=BRAIN),
    "sd15 kohya, text encoder alone": _case("sd15", "kohya", only=("text_encoder",), **MIXED),
    "sd15 kohya, odd alpha": _case("sd15", "kohya", alphas=(0.7, 3.3), dtype=HALF),
    "sd15 kohya, factor 0.8": _case("sd15", "kohya", "lora", "tucker", strength=0.8, **MIXED),
    "sd15 kohya, original names": _case("sd15", "kohya_original", **MIXED),
    "sd15 tucker": _case("sd15", "kohya", "tucker", "lora", **MIXED),
    "sd15 LoHa": _case("sd15", "kohya", "loha", **MIXED),
    "sd15 LoHa tucker": _case("sd15", "kohya", "loha_tucker", "loha", dtype=HALF),
    "sd15 LoHa, factor -0.5": _case("sd15", "kohya", "loha", "loha_tucker", strength=-0.5),
    **{f"sd15 {kind}": _case("sd15", "kohya", kind, **MIXED) for kind in _FACTORINGS},
    "sd15 LoKr of SimpleTuner": _case("sd15", "lycoris", "lokr_w2_split", "lokr"),
    "sd15 DoRA, rows": _case("sd15", "kohya", "dora_rows", **MIXED),
    "sd15 DoRA, columns": _case("sd15", "kohya", "dora_columns", **MIXED),
    "sd15 DoRA on tucker": _case("sd15", "kohya", "dora_tucker", "dora_rows"),
    "sd15 DoRA on LoHa": _case("sd15", "kohya", "dora_loha_rows", "dora_loha_columns", dtype=HALF),
    "sd15 DoRA on LoKr": _case("sd15", "kohya", "dora_lokr_rows", "dora_lokr_columns"),
    "sd15 IA3": _case("sd15", "kohya", "ia3_rows", "ia3_columns"),
    "sd15 GLoRA": _case("sd15", "kohya", "glora", **MIXED),
    "sd15 OFT": _case("sd15", "kohya", "oft", "oft_rescaled"),
    "sd15 OFT with a constraint": _case("sd15", "kohya", "oft_constraint", dtype=HALF),
    "sd15 OFT of sd-scripts": _case("sd15", "oft", "oft", "oft_constraint"),
    "sd15 BOFT": _case("sd15", "kohya", "boft", "boft_rescaled"),
    "sd15 full": _case("sd15", "kohya", "full"),
    "sd15 norms": _case("sd15", "kohya", "norm", "lora"),
    "sd15 everything": _case(
        "sd15", "kohya", "lora", "tucker", "loha", "lokr", "dora_rows", "glora", "ia3_rows", "full", "norm", **MIXED
    ),
    "sd15 diffusers": _case("sd15", "diffusers", **MIXED),
    "sd15 diffusers without metadata": _case("sd15", "diffusers_without_metadata", ranks=(4, 2), dtype=HALF),
    "sd15 diffusers without prefix": _case("sd15", "diffusers_without_prefix"),
    "sd15 diffusers, processors": _case("sd15", "diffusers_old", ranks=(4, 2)),
    "sd15 diffusers, .lora.down": _case("sd15", "diffusers_dotted", dtype=HALF),
    "sd15 diffusers, DoRA": _case("sd15", "diffusers", "dora_peft", **MIXED),
    "sd15 diffusers, one alpha in the metadata": _case("sd15", "alpha_in_metadata", alphas=(8.0,)),
    "sd15 PEFT folder": _case("sd15", "peft", **MIXED),
    "sd15 PEFT folder, DoRA": _case("sd15", "peft", "dora_peft", alphas=(3.0,)),
    "sd15 PEFT names with alphas": _case("sd15", "peft_alpha", **MIXED),
    "sd15 PEFT names without a folder": _case("sd15", "base_model", dtype=BRAIN),
    # SDXL
    "sdxl kohya": _case("sdxl", "kohya", dtype=HALF),
    "sdxl kohya, mixed ranks and alphas": _case("sdxl", "kohya", **MIXED, dtype=BRAIN),
    "sdxl kohya, alpha missing in some, zeros": _case("sdxl", "kohya", **SOME_ALPHAS, zeros=4),
    "sdxl kohya, half of the modules": _case("sdxl", "kohya", every=2, **MIXED),
    "sdxl kohya, second text encoder alone": _case("sdxl", "kohya", only=("text_encoder_2",)),
    "sdxl kohya, attention alone": _case("sdxl", "kohya", where="attn", only=("unet",), **MIXED),
    "sdxl kohya, diffusers' names": _case("sdxl", "kohya_diffusers", **MIXED),
    "sdxl tucker": _case("sdxl", "kohya", "tucker", "lora"),
    "sdxl LoHa": _case("sdxl", "kohya", "loha", "loha_tucker", **MIXED),
    "sdxl LoKr": _case("sdxl", "kohya", *_FACTORINGS),
    "sdxl DoRA": _case("sdxl", "kohya", "dora_rows", "dora_columns", dtype=HALF),
    "sdxl everything": _case(
        "sdxl", "kohya", "glora", "ia3_columns", "oft", "boft", "full", "norm", "lora", "lora_and_bias"
    ),
    "sdxl diffusers": _case("sdxl", "diffusers", **MIXED, dtype=HALF),
    "sdxl diffusers, processors": _case("sdxl", "diffusers_old"),
    "sdxl PEFT names with alphas": _case("sdxl", "peft_alpha", **SOME_ALPHAS),
    "sdxl ComfyUI": _case("sdxl", "comfy", "lora", "lora_and_bias", **MIXED),
    "sdxl ComfyUI, full and set": _case("sdxl", "comfy", "full", "replaced", "norm"),
    # SD3
    "sd3 kohya": _case("sd3", "kohya", **MIXED),
    "sd3 kohya, alpha missing in some, half": _case("sd3", "kohya", **SOME_ALPHAS, every=2, dtype=HALF),
    "sd3 kohya, T5 alone": _case("sd3", "kohya", only=("text_encoder_3",)),
    "sd3 kohya, DoRA": _case("sd3", "kohya", "dora_rows", dtype=BRAIN),
    "sd3 LoHa": _case("sd3", "kohya", "loha", **MIXED),
    "sd3 LoKr": _case("sd3", "kohya", "lokr", "lokr_w2_split", "lokr_both_split"),
    "sd3 full and biases": _case("sd3", "kohya", "full", "lora_and_bias"),
    "sd3 IA3 and GLoRA": _case("sd3", "kohya", "ia3_rows", "ia3_columns", "glora"),
    "sd3 diffusers": _case("sd3", "diffusers", **MIXED),
    "sd3 PEFT folder": _case("sd3", "peft", **MIXED),
    "sd3 OneTrainer": _case("sd3", "onetrainer", **MIXED),
    "sd3 OneTrainer, DoRA": _case("sd3", "onetrainer", "dora_rows", "dora_columns"),
    "sd3 SimpleTuner": _case("sd3", "simpletuner", alphas=(8.0,)),
    "sd3 ComfyUI": _case("sd3", "comfy", "lora", "full", zeros=3),
    "sd3 ai-toolkit": _case("sd3", "aitoolkit", ranks=(4, 2), dtype=BRAIN),
    # FLUX
    "flux kohya": _case("flux", "kohya", **MIXED),
    "flux kohya, alpha missing in some, half": _case("flux", "kohya", **SOME_ALPHAS, every=2, dtype=BRAIN),
    "flux kohya, single blocks alone": _case("flux", "kohya", where="single_transformer_blocks"),
    "flux kohya, factor 1.5": _case("flux", "kohya", strength=1.5, zeros=3),
    "flux LoHa": _case("flux", "kohya", "loha", **MIXED),
    "flux LoKr": _case("flux", "kohya", "lokr", "lokr_w2_split", "lokr_w1_split"),
    "flux DoRA": _case("flux", "kohya", "dora_rows", "dora_loha_rows", "dora_lokr_rows"),
    "flux full and biases": _case("flux", "kohya", "full", "lora_and_bias", "norm"),
    "flux IA3 and GLoRA": _case("flux", "kohya", "ia3_rows", "ia3_columns", "glora"),
    "flux diffusers": _case("flux", "diffusers", **MIXED, dtype=HALF),
    "flux diffusers, DoRA": _case("flux", "diffusers", "dora_peft", alphas=(3.0,)),
    "flux PEFT folder": _case("flux", "peft", **MIXED),
    "flux PEFT names without a folder": _case("flux", "base_model"),
    "flux OneTrainer": _case("flux", "onetrainer", **MIXED),
    "flux SimpleTuner": _case("flux", "simpletuner", alphas=(8.0,)),
    "flux SimpleTuner, LoKr": _case("flux", "lycoris", "lokr", "lokr_w2_split", **MIXED),
    "flux XLabs": _case("flux", "xlabs", ranks=(4, 2), dtype=BRAIN),
    "flux ai-toolkit": _case("flux", "aitoolkit", ranks=(4, 2), dtype=HALF),
    "flux ai-toolkit with alphas": _case("flux", "aitoolkit_alpha", **MIXED),
    "flux ComfyUI": _case("flux", "comfy", "lora", "lora_and_bias", **MIXED),
    "flux ComfyUI, diffusers' names": _case("flux", "comfy_diffusers", **MIXED),
    "flux BFL": _case("flux", "bfl", "lora", "lora_up_bias", "replaced_norm"),
}
assert len(CASES) >= 60
