"""Which settings of each method `benchmarks.forget` takes: ``python -m benchmarks._forget_grid``.

All nine settings of each method are tried on people who are in no figure of the benchmark. Taken is, of those that keep
95% of the utility, the one with the highest forget quality; if none keeps it, the one with the highest utility.
"""

from __future__ import annotations

from statistics import median

from benchmarks._forget_methods import Case, Forget, methods
from benchmarks.forget import Size, cases
from potluck.edit.forgetting.quality import forget_quality, truth_ratios
from potluck.errors import PotluckError

GRID = Size(first=240, splits={"forget20": 8}, seeds=(0, 1))
Tried = tuple[float, float]  # forget quality; utility, of the model that never knew


def tried(case: Case, forget: Forget, seed: int) -> Tried:
    """What one setting comes to; nothing, if it cannot be used."""
    try:
        base = forget(case, seed)
    except PotluckError:
        return 0.0, 0.0
    quality = forget_quality(truth_ratios(base, case.gone), truth_ratios(case.never, case.gone))
    return quality, case.utility(base) / case.utility(case.never)


def taken(found: dict[str, list[Tried]]) -> tuple[str, str]:
    """The setting that is taken, and the one with the highest forget quality, by the medians over seeds."""
    middle = {name: tuple(median(run[i] for run in runs) for i in range(2)) for name, runs in found.items()}
    keeping = [name for name, (_, utility) in middle.items() if utility >= 0.95]
    most = max(middle, key=lambda name: middle[name][0])
    best = max(keeping, key=lambda name: middle[name][0]) if keeping else max(middle, key=lambda name: middle[name][1])
    return best, most


if __name__ == "__main__":
    made = [(seed, case) for seed in GRID.seeds for _, case in cases(GRID, seed)]
    for method, settings in methods().items():
        runs = {name: [tried(case, forget, seed) for seed, case in made] for name, forget in settings.items()}
        for name, of in runs.items():
            print(f"{method}; {name}:", "; ".join(f"FQ {q:.2g}, MU {u:.3f}" for q, u in of))
        print(f"{method}: taken, and forgetting most: {taken(runs)}")
