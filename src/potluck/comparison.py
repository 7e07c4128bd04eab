"""Together, each alone, and pooled: the same recipe, the same initial weights, equal tokens.

- *together*: the recipe as it is.
- *alone*: one participant takes just the local steps that it takes in the run together, on its own text only: none, if
  it is never asked.
- *pooled*: each local step averages the gradients of one batch from every participant that is asked in the round, as
  data-parallel training of all text in one place would: the tokens that all together process, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from potluck.recipe import Recipe
from potluck.recipe.outer import OuterSgd
from potluck.recipe.updates import Updates
from potluck.records.folder import POOLED, Variant
from potluck.rounds.sampling import asked_in


@dataclass(frozen=True)
class Planned:
    """One run of a comparison: where it goes, what it is, and its own recipe."""

    folder: Path
    variant: Variant
    recipe: Recipe


def planned_runs(recipe: Recipe, folder: Path, pooled: bool) -> Iterator[Planned]:
    """The runs of a comparison, in the order in which they are made."""
    names = recipe.participant_names
    yield Planned(folder / "together", Variant("together", names), recipe)
    rounds = asked_in(recipe)
    for name in names:
        served = sum(name in chosen for chosen in rounds)
        yield Planned(folder / "alone" / name, Variant("alone", (name,)), _solo(recipe, served, {"fraction": None}))
    if pooled:  # it keeps how many are asked: so many batches make a step
        asked = {"participants_per_round": recipe.rounds.participants_per_round}
        yield Planned(folder / POOLED, Variant("pooled", (POOLED,)), _solo(recipe, len(rounds), asked))


def _solo(recipe: Recipe, rounds: int, changes: Mapping[str, object]) -> Recipe:
    """One trainer, no outer step, nothing compressed: after each round the shared state is what it reached.

    The learning rate follows the run's own local steps; a run of fewer rounds warms up for the same share of it.
    """
    changed = {
        "count": rounds,
        "participants_per_round": 1,
        "min_contributors": 1,
        "on_failure": "stop",
        "streaming": None,
        **changes,
    }
    schedule = recipe.local.schedule
    warmup = schedule.warmup_steps * rounds // max(1, recipe.rounds.count)
    local = recipe.local.model_copy(update={"schedule": schedule.model_copy(update={"warmup_steps": warmup})})
    solo_rounds = recipe.rounds.model_copy(update=changed)
    return recipe.model_copy(update={"outer": OuterSgd(), "local": local, "rounds": solo_rounds, "updates": Updates()})
