"""Files that a training leaves in a folder, by name: which are part of a merged model, and which are not."""

# A reward model's last layer, which TRL, LLaMA-Factory and ms-swift read beside the weights under this very name.
VALUE_HEAD = "value_head.safetensors"
# What sentence-transformers reads beside the weights; modules.json names folders besides.
SENTENCE_MODULES = "modules.json"
SENTENCE = frozenset({SENTENCE_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json"})
_STATE = frozenset(
    {
        "trainer_state.json", "trainer_log.jsonl", "all_results.json", "train_results.json", "eval_results.json",
        "predict_results.json", "training_args.json", "args.json", "sft_args.json", "additional_config.json",
        "latest",
    }
)  # fmt: skip
_STATE_OF_LIBRARIES = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "random_states")


def is_adapters(name: str) -> bool:
    """Whether a file of this name belongs to an adapter, which no base hands on to what is merged of it."""
    return name.startswith("adapter_") or name == "adapters.safetensors" or name == VALUE_HEAD


def is_state(name: str) -> bool:
    """Whether it is a trainer's own: logs, arguments, what it takes to resume."""
    return name in _STATE or name.startswith(_STATE_OF_LIBRARIES)
