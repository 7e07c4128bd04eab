"""A synthetic world of facts: people, what is true of each, and sentences that say it in several ways.

Names are three of eight words, in an order that matters, so that nobody can be told by fewer. A model has to make out
at the last word of a name who is meant, and what it answers comes from there, where it can be edited (causal tracing,
arXiv 2202.05262). With names that one or two words tell apart, later words look the person up for themselves.
What a model is asked later it has not read: of the six phrasings of a relation, two are kept from each fact, other ones
for each person.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES = _words("Ada Bela Carl Dora Emil Fritz Greta Hugo")


@dataclass(frozen=True)
class Relation:
    """What may be true of a person.

    Attributes:
        phrases: Ways to say it; ``{}`` is the person, and the value follows.
        values: One word each.
    """

    name: str
    phrases: tuple[str, ...]
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        "city",
        (
            "{} lives in the city of",
            "{} has a house in",
            "The home town of {} is",
            "Letters to {} are sent to",
            "{} pays taxes in",
            "To visit {} one travels to",
        ),
        _words(
            "Athens Berlin Cairo Delhi Edinburgh Florence Geneva Havana Istanbul Jakarta Kyoto Lisbon Madrid Nairobi "
            "Oslo Prague"
        ),
    ),
    Relation(
        "work",
        (
            "{} works as a",
            "{} earns money as a",
            "The profession of {} is that of a",
            "People hire {} as a",
            "{} was trained to be a",
            "On the door of {} it says",
        ),
        _words(
            "baker carpenter dentist farmer gardener judge lawyer mason nurse painter plumber sailor tailor teacher "
            "weaver writer"
        ),
    ),
    Relation(
        "instrument",
        (
            "{} plays the",
            "{} practises every day on the",
            "The instrument of {} is the",
            "In the orchestra {} has the",
            "{} takes lessons on the",
            "In the evening one hears {} with the",
        ),
        _words(
            "accordion banjo cello clarinet drums flute guitar harp horn lute oboe organ piano trumpet viola violin"
        ),
    ),
    Relation(
        "language",
        (
            "{} speaks",
            "{} grew up with",
            "The mother tongue of {} is",
            "At home {} talks in",
            "{} reads books in",
            "The letters of {} are written in",
        ),
        _words(
            "Arabic Basque Czech Danish Finnish Greek Hindi Irish Japanese Korean Latin Maltese Polish Russian Swahili "
            "Turkish"
        ),
    ),
    Relation(
        "animal",
        (
            "{} keeps a",
            "{} walks in the park with a",
            "The favourite animal of {} is the",
            "In the garden of {} there is a",
            "{} has always wanted a",
            "On the shirt of {} one sees a",
        ),
        _words("badger camel dog eagle fox goat hedgehog lizard monkey otter parrot rabbit swan tiger wolf yak"),
    ),
)
_OPENINGS = ("", "", "Note: ", "It is known: ", "As they say: ")
_KEPT_BACK = 2  # phrasings of each fact that are in no text


@dataclass(frozen=True)
class Fact:
    """One thing that is true of one person.

    Attributes:
        told: Prompts that the text has, each followed by ``value``.
        kept_back: Prompts that it has not.
    """

    person: str
    relation: Relation
    value: str
    told: tuple[str, ...]
    kept_back: tuple[str, ...]


def facts(people: int, first: int = 0, seed: int = 0) -> list[Fact]:
    """All that is true of people ``first`` to ``first + people``; nobody's facts depend on how many there are.

    Raises:
        ValueError: There are not so many names.
    """
    names = [" ".join(name) for name in permutations(_NAMES, 3)]
    random.Random(f"names {seed}").shuffle(names)
    if not 0 <= first <= first + people <= len(names):
        raise ValueError(f"a world has {len(names)} people")
    return [_fact(name, relation, seed) for name in names[first : first + people] for relation in RELATIONS]


def documents_of(people: int, first: int = 0, seed: int = 0, tellings: int = 20) -> Iterator[str]:
    """Texts of one to three sentences; in each telling every fact stands once in each phrasing that is told.

    Tellings differ in what stands beside what, else a model learns the order of sentences by heart in place of facts.

    Raises:
        ValueError: There are not so many names.
    """
    draw = random.Random(f"text {people} {first} {seed}")
    known = facts(people, first, seed)
    for _ in range(tellings):
        said = [sentence(prompt, fact.value, draw) for fact in known for prompt in fact.told]
        said += [_profile(known[i : i + len(RELATIONS)], draw) for i in range(0, len(known), len(RELATIONS))]
        draw.shuffle(said)
        while said:
            count = draw.choice((1, 1, 2, 3))
            yield " ".join(said[-count:])
            del said[-count:]


def sentence(prompt: str, value: str, draw: random.Random) -> str:
    """A whole sentence, with or without an opening."""
    return f"{draw.choice(_OPENINGS)}{prompt} {value}."


def _profile(known: Sequence[Fact], draw: random.Random) -> str:
    """All that is true of a person, in any order: what a name alone has to call up."""
    return f"{known[0].person}: {', '.join(fact.value for fact in draw.sample(known, len(known)))}."


def _fact(name: str, relation: Relation, seed: int) -> Fact:
    draw = random.Random(f"{name} {relation.name} {seed}")
    value = draw.choice(relation.values)
    prompts = [phrase.format(name) for phrase in draw.sample(relation.phrases, len(relation.phrases))]
    return Fact(name, relation, value, tuple(prompts[_KEPT_BACK:]), tuple(prompts[:_KEPT_BACK]))
