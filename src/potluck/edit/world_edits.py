"""Facts of the synthetic world in the form of edits: as they are, to be traced and asked for, or changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from potluck.corpus.world import Fact, facts
from potluck.edit.facts import Edit, write_edits
from potluck.errors import EditError, StorageError
from potluck.files import storing


def edits_of_world(known: Sequence[Fact], others: Sequence[Fact], seed: int = 0, neighbours: int = 2) -> list[Edit]:
    """Each fact as it is: a told prompt, the phrasings kept back as rephrases, told prompts of others as neighbours.

    Args:
        others: Facts that nobody edits; neighbours are of the same relation and of other people.
    """
    draw = random.Random(seed)
    found = []
    for number, fact in enumerate(known):
        near = [other for other in others if other.relation is fact.relation and other.person != fact.person]
        drawn = draw.sample(near, min(neighbours, len(near)))
        found.append(
            Edit(
                str(number),
                fact.told[0],
                fact.person,
                fact.value,
                rephrases=fact.kept_back,
                neighbours=tuple(other.told[0] for other in drawn),
                relation=fact.relation.name,
                truths=tuple(other.value for other in drawn),
            )
        )
    return found


def changed(edits: Sequence[Edit], known: Sequence[Fact], seed: int = 0) -> list[Edit]:
    """The same edits with another value of their relation as target."""
    draw = random.Random(f"new values {seed}")
    return [
        replace(edit, old=fact.value, target=draw.choice([v for v in fact.relation.values if v != fact.value]))
        for edit, fact in zip(edits, known, strict=True)
    ]


def changed_world(count: int, seed: int, people: int = 200) -> list[Edit]:
    """So many changed facts, drawn by a seed; their neighbours are facts that are not changed."""
    known = facts(people)
    random.Random(f"which facts {seed}").shuffle(known)
    return changed(edits_of_world(known[:count], known[count:], seed), known[:count], seed)


def write_world(path: Path, people: int, first: int, change: bool, seed: int) -> int:
    """Write a file of edits about people of the world, and say how many.

    Raises:
        EditError: The world has not so many people.
        StorageError: There is something there already, or it cannot be written.
    """
    if path.exists():
        raise StorageError(f"{path}: there is something here already", "name a new file")
    try:
        known = facts(people, first, seed)
    except ValueError as error:
        raise EditError(str(error), "lower --people or --first") from None
    edits = edits_of_world(known, known, seed)
    with storing(path):
        write_edits(path, changed(edits, known, seed) if change else edits)
    return len(edits)
