"""Merging what participants trained.

Adapters beside PEFT (`_merge_adapters`), and full models beside mergekit (`_merge_models`).
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks._measure import Measurement, main
from benchmarks._merge_adapters import ADAPTER_SIZES, AdapterSize, measure_adapters
from benchmarks._merge_models import MODEL_SIZES, ModelSize, measure_models


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is merged."""

    adapters: AdapterSize
    models: ModelSize


SIZES = {name: Size(adapters=ADAPTER_SIZES[name], models=MODEL_SIZES[name]) for name in ("short", "full")}


def measure(size: Size) -> list[Measurement]:
    return [*measure_adapters(size.adapters), *measure_models(size.models)]


if __name__ == "__main__":
    main(measure, SIZES)
