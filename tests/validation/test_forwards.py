"""What saves a validation forwards and passes over logits gives what the plain way gives."""

from typing import Any

import pytest
import torch
import transformers

from lora_export.progress import Silent
from lora_export.validation.comparing.decoder import DecoderComparison, greedy, guesses
from lora_export.validation.comparing.logits import PIECE, TOP, best, compare_logits
from lora_export.validation.graphs.runs import OnnxDecoder

WIDTHS = (3, PIECE, TOP * PIECE + 1, 9 * PIECE, 20 * PIECE + 7)


# --- logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_best_tokens_of_any_vocabulary_are_those_of_a_whole_row(width: int) -> None:
    logits = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    logits[::2, -1] = 9.0  # beside the pieces, where the width is no multiple of them
    found, whole = best(logits), logits.topk(min(TOP, width), -1)
    assert torch.equal(logits.gather(-1, found), whole.values)
    assert torch.equal(found[:, 0], logits.argmax(-1))


def test_best_of_equal_tokens_is_the_first() -> None:
    logits = torch.randint(0, 4, (40, 9 * PIECE), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(best(logits)[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("moved", [1e-5, 3.0])
def test_compare_logits_of_a_wide_vocabulary_is_the_sum_of_its_definition(moved: float) -> None:
    generator = torch.Generator().manual_seed(2)
    a = 5 * torch.randn(20, 9 * PIECE, generator=generator) + 30
    b = a + moved * torch.randn(a.shape, generator=generator)
    kept = a.clone(), b.clone()
    p, q = (torch.log_softmax(x.double(), -1) for x in (a, b))
    found = compare_logits([a], [b], [torch.arange(20)])
    wanted = (p.exp() * (p - q)).sum(-1)
    assert torch.tensor(found.kl, dtype=torch.float64).allclose(wanted, rtol=1e-5, atol=1e-14)
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


# --- greedy texts -----------------------------------------------------------------------------------------------


def _llama() -> Any:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_guesses_of_prompts_of_any_length_are_what_the_model_writes_alone() -> None:
    model, prompts = _llama(), [torch.tensor(ids) for ids in ([3, 7], [9, 4, 11, 60, 2, 5], [8, 1, 30])]
    found = guesses(model, prompts, 6)
    assert [text.tolist() for text in found if text is not None] == [greedy(model, p, 6).tolist() for p in prompts]


class Counting:
    """Stands for a graph's decoder, whose next token is its input plus one; notes the shapes of its steps."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def step(self, ids: Any, state: Any) -> Any:
        self.shapes.append(ids.shape)
        return torch.nn.functional.one_hot(torch.from_numpy(ids) + 1, 100).float().numpy(), state


def test_graph_greedy_equal_lengths_share_a_batch_and_the_first_is_alone() -> None:
    runner = OnnxDecoder.__new__(OnnxDecoder)
    runner._decoder = counting = Counting()  # type: ignore[assignment]
    prompts = [torch.tensor(ids) for ids in ([1, 2], [5, 6, 7], [8, 9], [3, 4, 5])]
    assert [t.tolist() for t in runner.greedy(prompts, 2)] == [[3, 4], [8, 9], [10, 11], [6, 7]]
    assert counting.shapes == [(1, 2), (1, 1), (2, 3), (2, 1), (1, 2), (1, 1)]


# --- rounding errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "again"), [(5, 4), (3, 3)])
def test_draws_the_longest_of_several_prompts_is_run_under_the_first(count: int, again: int) -> None:
    model, calls = _llama(), list[int]()
    model.register_forward_pre_hook(
        lambda _, __, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    tokens = [torch.arange(n) for n in (4, 9, 2, 5, 3)[:count]]
    comparison = DecoderComparison(dtypes={}, progress=Silent(), tokens=tokens, tokenizer=None)
    first = list(comparison._under_errors(model))
    assert calls == [len(ids) for ids in tokens]
    second = list(comparison._under_errors(model))
    assert len(calls) == count + again
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
