"""mergekit's TIES of the folders that `benchmarks._merge_models` wrote: ``mergekit_ties ROOT MODELS DTYPE DENSITY``.

Prints seconds, peak memory in bytes, and mergekit's version as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from importlib.metadata import version

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def main(root: str, models: int, dtype: str, density: float) -> None:
    parameters = {"weight": 1 / models, "density": density}
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "ties",
            "base_model": f"{root}/base",
            "dtype": TYPES[dtype],
            "models": [{"model": f"{root}/model-{i}", "parameters": parameters} for i in range(models)],
        }
    )
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False, async_write=True)
    with tempfile.TemporaryDirectory(dir=root) as out:
        began = time.perf_counter()
        run_merge(config, out, options)
        took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"seconds": took, "peak": peak, "version": version("mergekit")}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
