"""Names that nobody has, made of those that occur: what is asked about them, nobody knows and nobody edited."""

from __future__ import annotations

import random
from collections.abc import Sequence

from potluck.errors import EditError

_GIVEN = ("Ada", "Boris", "Carla", "Daniel", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Klara", "Martin")
_BEGIN = ("Bel", "Dorn", "Fal", "Hart", "Kor", "Mar", "Nor", "Sel", "Tam", "Vell")
_END = ("berry", "dane", "ham", "ovic", "quist", "ram", "stead", "wick")


def stranger_names(subjects: Sequence[str], seed: int, count: int = 64) -> list[str]:
    """Names that nobody has, made of those that occur.

    Where the last word tells all apart, a stranger's is new: the halves of two. Where it does not, every word is one
    that stands at its place in some name, so that only their combination is new.

    Raises:
        EditError: From these none can be made.
    """
    known = [words for subject in sorted(set(subjects)) if (words := subject.split())]
    told_apart = len({words[-1] for words in known}) == len(known)
    used = {words[-1] for words in known} if told_apart else {" ".join(words) for words in known}
    draw, found = random.Random(f"strangers {seed}"), dict[str, None]()
    for _ in range(count * 8 if len(known) > 1 else 0):
        like, one, two = (draw.choice(known) for _ in range(3))
        if told_apart:
            last = one[-1][: (len(one[-1]) + 1) // 2] + two[-1][len(two[-1]) // 2 :]
            name, new = " ".join([*like[:-1], last]), one != two and last not in used
        else:
            words = [draw.choice([other[place] for other in known if len(other) > place]) for place in range(len(like))]
            name, new = " ".join(words), len(set(words)) == len(words) and " ".join(words) not in used
        if new:
            found[name] = None
    if not found:
        raise EditError("no strangers' names can be made of these", "give --retain questions that name other subjects")
    return list(found)[:count]


def invented_names(seed: int, count: int = 64) -> list[str]:
    """Common given names, each with a family name that is none."""
    draw = random.Random(f"invented {seed}")
    names = [f"{given} {begin}{end}" for given in _GIVEN for begin in _BEGIN for end in _END]
    return draw.sample(names, count)
