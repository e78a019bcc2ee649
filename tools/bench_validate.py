"""Peak memory and time of a validation, with the models in memory and streamed.

    python tools/bench_validate.py BASE ADAPTER MERGED PROMPTS [MAX_MEMORY …]

Each limit (bytes; 0: no limit) runs in a process of its own. Prints one JSON line for each: seconds, the peak
resident set in MB beyond that of the imports, and the checks.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def peak() -> float:
    """Peak resident set of this process in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(base: Path, adapter: Path, merged: Path, prompts: Path, limit: int) -> None:
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers

    from lora_export.contracts import AdapterChoice
    from lora_export.progress import Silent
    from lora_export.validation import ValidationOptions, validate

    # The lazy part of the libraries.
    transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast, transformers.BertModel  # noqa: B018
    imports, start = peak(), time.monotonic()
    options = ValidationOptions(prompts, provider="cpu", max_memory=limit or None)
    result = validate(base, [AdapterChoice(adapter)], merged, options=options, progress=Silent())
    print(
        json.dumps(
            {
                "limit": limit,
                "seconds": round(time.monotonic() - start, 1),
                "imports_mb": round(imports),
                "beyond_imports_mb": round(peak() - imports),
                "passed": result.passed,
                "checks": {c.name: c.value for c in result.checks},
            }
        )
    )


def main() -> None:
    paths, limits = [Path(p) for p in sys.argv[1:5]], sys.argv[5:] or ["0", "300000000"]
    if len(limits) == 2 and limits[0] == "--one":
        measure(*paths, int(limits[1]))
        return
    for limit in limits:
        subprocess.run([sys.executable, __file__, *map(str, paths), "--one", limit], check=True)


if __name__ == "__main__":
    main()
