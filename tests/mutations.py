"""Deliberate faults, each with the test that must catch it: run by test_mutations.py, listed in README.md."""

from dataclasses import dataclass

MATRIX = "tests/matrix/test_matrix.py::test_merged_equals_unmerged"
BITSANDBYTES = "tests/quantization/test_bitsandbytes.py"
FORMATS = "tests/quantization/test_formats.py"


@dataclass(frozen=True)
class Mutation:
    """In `file` of the package, `old` becomes `new`; `caught_by` is a pytest node id."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str


MUTATIONS = (
    Mutation(
        "the scaling of lora_bias is dropped", "adapters/lora.py",
        "return weight + self.scaling * self.addend[rows]", "return weight + self.addend[rows]",
        f"{MATRIX}[lora lora_bias on llama]",
    ),
    Mutation(
        "alpha/r for alpha/√r", "adapters/config.py",
        "return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank", "return alpha / rank",
        f"{MATRIX}[lora rslora on llama]",
    ),
    Mutation(
        "the last matching pattern decides, not the first", "adapters/config.py",
        "for key, value in pattern.items():", "for key, value in reversed(pattern.items()):",
        f"{MATRIX}[lora patterns on llama]",
    ),
    Mutation(
        "the transpose of a square Conv1D is forgotten", "adapters/lora.py",
        "return self.file.is_conv1d(self.name) if self.shapes[0] == self.shapes[1] else shape == self.shapes[1]",
        "return self.shapes[0] != self.shapes[1] and shape == self.shapes[1]",
        f"{MATRIX}[lora on gpt2]",
    ),
    Mutation(
        "B of fused experts is taken as expert-major", "adapters/experts.py",
        "up.reshape(-1, rank, experts).permute(2, 0, 1)", "up.reshape(-1, experts, rank).permute(1, 0, 2)",
        f"{MATRIX}[lora experts on mixtral]",
    ),
    Mutation(
        "the wrappers of two expert parameters are exchanged", "adapters/experts.py",
        "innermost_first = sorted(depths, reverse=True)", "innermost_first = sorted(depths)",
        f"{MATRIX}[lora experts on qwen2 moe]",
    ),
    Mutation(
        "DoRA forgets the norm of V", "adapters/dora.py",
        "torch.linalg.norm(changed, dim=1)", "torch.ones(len(changed))",
        f"{MATRIX}[dora on llama]",
    ),
    Mutation(
        "AdaLoRA divides by r, not by the initial rank", "adapters/adalora.py",
        '/ (init_r + 1e-5)', '/ (whole(config, "r", file.where) + 1e-5)',
        f"{MATRIX}[adalora pruned on llama]",
    ),
    Mutation(
        "trained token rows are added, not put in place", "adapters/tokens.py",
        "return weight.index_copy(0, places,", "return weight.index_add(0, places,",
        f"{MATRIX}[lora tokens on llama]",
    ),
    Mutation(
        "IA3 scales inputs for outputs", "adapters/ia3.py",
        "by_rows = not feedforward", "by_rows = feedforward",
        f"{MATRIX}[ia3 on bert]",
    ),
    Mutation(
        "LoHa adds its two products", "adapters/loha.py",
        "(first * second)", "(first + second)",
        f"{MATRIX}[loha on llama]",
    ),
    Mutation(
        "the factors of LoKr are exchanged", "adapters/lokr.py",
        "self.first[index // len(self.second)], self.second[index % len(self.second)]",
        "self.first[index % len(self.first)], self.second[index // len(self.first)]",
        f"{MATRIX}[lokr on llama]",
    ),
    Mutation(
        "VeRA forgets λd", "adapters/vera.py",
        "right = file.read(d_key)[:, None] * down", "right = down",
        f"{MATRIX}[vera on llama]",
    ),
    Mutation(
        "VeRA draws B before A", "adapters/vera.py",
        "for shape in ((rank, widest), (outputs, rank)):", "for shape in ((outputs, rank), (rank, widest)):",
        f"{MATRIX}[vera regenerated on llama]",
    ),
    Mutation(
        "OFT rotates the other way", "adapters/oft.py",
        "RotationUpdate(blocks.mT if embedding else blocks)", "RotationUpdate(blocks if embedding else blocks.mT)",
        f"{MATRIX}[oft on llama]",
    ),
    Mutation(
        "PiSSA's residual is not taken out of the base", "adapters/lora.py",
        "changed: torch.Tensor = exact - taken + delta", "changed: torch.Tensor = exact + delta",
        f"{MATRIX}[lora pissa on llama]",
    ),
    Mutation(
        "a trained head stays tied", "merge/plan.py",
        'changes["tie_word_embeddings"] = False', "pass",
        "tests/merge/test_against_peft.py::test_merged_model_computes_what_the_unmerged_one_computes"
        "[lora on the head, tied]",
    ),
    Mutation(
        "replicated layers share the first layer's update", "merge/replication.py",
        '= f"{prefix}{old}{rest}"', '= f"{prefix}0{rest}"',
        f"{MATRIX}[lora replication on llama]",
    ),
    Mutation(
        "the delta is rounded before it is added", "merge/work.py",
        "rounded = result.to(dtype)", "rounded = weight.to(dtype) + (result - weight).to(dtype)",
        "tests/properties/test_merge_properties.py::test_any_low_rank_update_is_rounded_once",
    ),
    Mutation(
        "the two nibbles of a byte are exchanged", "quantization/bnb4.py",
        "torch.stack((book.repeat_interleave(16), book.repeat(16)), dim=1)",
        "torch.stack((book.repeat(16), book.repeat_interleave(16)), dim=1)",
        f"{BITSANDBYTES}::test_other_block_sizes[64]",
    ),
    Mutation(
        "the offset of double quantization is forgotten", "quantization/bnb4.py",
        '* spread + self.state["nested_offset"]', "* spread",
        f"{BITSANDBYTES}::test_other_block_sizes[128]",
    ),
    Mutation(
        "GPTQ's zeros are taken as they are stored", "quantization/gptq.py",
        "zeros = (zeros + 1) & mask", "zeros = zeros & mask",
        f"{FORMATS}::test_gptq[False-False-32-4]",
    ),
    Mutation(
        "AWQ's outputs are not interleaved", "quantization/awq.py",
        "ORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "ORDER = (0, 1, 2, 3, 4, 5, 6, 7)",
        f"{FORMATS}::test_awq[32]",
    ),
)  # fmt: skip
