"""Another merger that goes shard by shard: axolotl's, as its command line calls it.

    python tools/merge_with_axolotl.py BASE ADAPTER OUT

It takes plain LoRA and DoRA. `--with-axolotl PYTHON` names the Python of an environment that has it.
"""

import sys

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient

if __name__ == "__main__":
    merge_lora_sharded_efficient(*sys.argv[1:])
