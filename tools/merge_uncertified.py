"""The same merge without hashes and float64 rows, through the Python API: what certification costs.

python tools/merge_uncertified.py BASE ADAPTER OUT
python tools/merge_uncertified.py BASE ADAPTER OUT certified
"""

import json
import sys
from pathlib import Path

from lora_export.contracts import AdapterChoice
from lora_export.merging import merge
from lora_export.storage.documents import as_json

if __name__ == "__main__":
    base, adapter, output, *certified = sys.argv[1:]
    result = merge(Path(base), [AdapterChoice(Path(adapter))], Path(output), certified=bool(certified))
    print(json.dumps(as_json(result)))
