"""Who is asked in which round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np

from potluck.recipe import Recipe


def asked_by_round(
    names: Sequence[str], count: int, sampling: Literal["without-replacement", "uniform"], seed: int
) -> Iterator[list[str]]:
    """The participants asked in round 0, 1, ..., each time ``count`` of ``names`` in their order in ``names``.

    ``uniform`` draws each round afresh. ``without-replacement`` deals from a shuffled deck of all: nobody serves
    twice before all have served once. When a deck ends within a round, whoever the round already has goes to the
    end of the next deck.
    """
    draws = np.random.default_rng(seed)
    deck: list[int] = []
    while True:
        if sampling == "uniform":
            chosen = [int(i) for i in draws.permutation(len(names))[:count]]
        else:
            chosen, deck = deck[:count], deck[count:]
            if len(chosen) < count:
                shuffled = [int(i) for i in draws.permutation(len(names))]
                deck = [i for i in shuffled if i not in chosen] + [i for i in shuffled if i in chosen]
                missing = count - len(chosen)
                chosen, deck = chosen + deck[:missing], deck[missing:]
        yield [names[i] for i in sorted(chosen)]


def asked_in(recipe: Recipe) -> list[list[str]]:
    """Who is asked in each round of a recipe."""
    names, settings = recipe.participant_names, recipe.rounds
    return list(islice(asked_by_round(names, recipe.asked_per_round, settings.sampling, recipe.seed), settings.count))
