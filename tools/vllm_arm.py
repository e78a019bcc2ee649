"""One engine of vLLM for bench_vllm.py, in vLLM's own environment: a request a line on stdin, an answer a line.

    python vllm_arm.py '{"folder": …, "adapter": …, "dtype": …, "eager": …, "tokens": …, "batch": …}'

The first line that is written says that the engine is ready. A request has `batch`, `phase`, `steps` and `adapter`
(whether it asks for it). The answer is the seconds of each step of the engine: of `steps` prompts that are read
(prefill), or of `steps` tokens that are generated behind a short one (decode); or those tokens themselves (tokens).
"""

import json
import os
import sys
import time

SHORT = 16  # tokens of the prompt that a decode starts from


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    asked = json.loads(sys.argv[1])
    # The engine runs in this process: one of several processes spins while it waits, and would disturb others.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    import vllm
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_lora_rank": asked["rank"], "max_loras": 1} if asked["adapter"] else {}
    model = vllm.LLM(
        asked["folder"], dtype=asked["dtype"], enforce_eager=asked["eager"], enable_prefix_caching=False,
        max_model_len=asked["tokens"] + 64, max_num_seqs=asked["batch"], kv_cache_memory_bytes=2**28,
        max_num_batched_tokens=asked["batch"] * asked["tokens"], **lora,
    )  # fmt: skip
    engine = model.llm_engine
    words = min(1000, engine.model_config.get_vocab_size())
    adapter = LoRARequest("adapter", 1, asked["adapter"]) if asked["adapter"] else None
    count = 0

    def steps(batch: int, length: int, tokens: int, chosen: object) -> tuple[list[float], list[int]]:
        """Seconds of each step until `batch` prompts have got their tokens, and the first one's tokens. The first
        step reads the prompts."""
        nonlocal count
        sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for row in range(batch):
            count += 1
            ids = [(100 + 7 * i + 13 * row) % words for i in range(length)]
            engine.add_request(str(count), {"prompt_token_ids": ids}, sampling, lora_request=chosen)
        taken, said, first = [], [], str(count - batch + 1)
        while engine.has_unfinished_requests():
            started = time.perf_counter()
            outputs = engine.step()
            taken.append(time.perf_counter() - started)
            said = next((list(o.outputs[0].token_ids) for o in outputs if o.request_id == first), said)
        if len(taken) != tokens:
            raise SystemExit(f"{len(taken)} steps for {tokens} tokens: the prompts were not read in one")
        return taken, said

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"compilation": str(engine.vllm_config.compilation_config.mode), "version": vllm.__version__})
    for line in sys.stdin:
        wanted = json.loads(line)
        chosen = adapter if wanted["adapter"] else None
        if wanted["phase"] == "prefill":
            answer([steps(wanted["batch"], asked["tokens"], 1, chosen)[0][0] for _ in range(wanted["steps"])])
            continue
        taken, said = steps(wanted["batch"], SHORT, wanted["steps"] + 1, chosen)
        answer(said if wanted["phase"] == "tokens" else taken[1:])


if __name__ == "__main__":
    main()
