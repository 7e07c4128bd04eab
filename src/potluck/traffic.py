"""The messages of a run before it runs: to whom, when and of how many bytes, without torch.

It follows the rounds (`potluck.rounds.sync`), the form of updates (`potluck.updates.sizes`) and the way down
(`potluck.updates.download`) message by message. Only the figures in headers are typical ones, a few bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from potluck.contribution import Scalar
from potluck.errors import RecipeError
from potluck.models.shapes import Shapes
from potluck.recipe import Recipe
from potluck.recipe.outer import OuterAdagrad, OuterAdam, OuterSgd, OuterSign, OuterYogi
from potluck.recipe.updates import (
    BlockTopK,
    DeltaDownload,
    Eager,
    FullDownload,
    Quantize,
    QuantizedDownload,
    RandomK,
    TopK,
)
from potluck.rounds.sampling import asked_by_round
from potluck.updates.fragments import Fragment, fragments_of
from potluck.updates.framing import fields_of, message_bytes
from potluck.updates.sizes import Form, elements, layout_after, packed, payload_bytes, update_forms

_LOSS = 5.012345678901234  # as many digits as most
_NATS = 12345.678901234567
_COUNT = 12345
Forms = dict[str, Form]


@dataclass(frozen=True)
class Exchange:
    """Tasks that go out together; what comes next waits for all replies.

    Attributes:
        revision: Outer steps behind the shared state that is trained from or evaluated.
        names: Who is asked.
        down: Bytes of the task to each of them.
        up: Bytes of each reply.
        steps: Local steps before the reply leaves; 0 is an evaluation.
        overlap: Local steps that go on while it travels.
    """

    revision: int
    names: tuple[str, ...]
    down: tuple[int, ...]
    up: int
    steps: int = 0
    overlap: int = 0


def exchanges(recipe: Recipe, shapes: Shapes) -> Iterator[Exchange]:
    """All of a run, in order: the first evaluation, and rounds with evaluations between them.

    Everybody is taken to be there and to hold out text.

    Raises:
        RecipeError: The model has too few layers for its fragments.
    """
    messages, everybody = Messages(recipe, shapes), recipe.participant_names
    held: dict[str, int] = {}

    def tasks(kind: str, names: tuple[str, ...], revision: int) -> tuple[int, ...]:
        sizes = tuple(messages.task(kind, held.get(name), revision) for name in names)
        held.update(dict.fromkeys(names, revision))
        return sizes

    evaluates = bool(recipe.data.validation_fraction)
    asked = asked_by_round(everybody, recipe.asked_per_round, recipe.rounds.sampling, recipe.seed)
    if evaluates:
        yield Exchange(0, everybody, tasks("evaluate", everybody, 0), messages.answer)
    for revision, chosen in enumerate(islice(asked, recipe.rounds.count)):
        names = tuple(chosen)
        steps, overlap = recipe.steps_of_round(revision + 1)
        yield Exchange(
            revision, names, tasks(recipe.training_kind, names, revision), messages.update(revision), steps, overlap
        )
        done = revision + 1
        if evaluates and (done == recipe.rounds.count or done % recipe.rounds.evaluate_every == 0):
            yield Exchange(done, everybody, tasks("evaluate", everybody, done), messages.answer)


@dataclass
class Messages:
    """Sizes of a run's messages in bytes, headers included.

    Attributes:
        fragments: The parts of the model that take turns.
        answer: Of a reply to an evaluation.
    """

    recipe: Recipe
    shapes: Shapes
    fragments: tuple[Fragment, ...] = field(init=False)
    answer: int = field(init=False)
    _updates: list[int] = field(init=False)
    _tasks: dict[tuple[str, int | None, int, int], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.fragments = fragments_of(self.shapes, self.recipe.fragments)
        except ValueError as error:
            raise RecipeError(f"rounds.streaming.fragments: {error}") from None
        revision = self.recipe.rounds.count // 2
        figures: dict[str, Scalar] = {"nats": _NATS, "tokens": _COUNT, "bytes": _COUNT}
        self.answer = message_bytes(fields_of("contribution", "evaluate", revision, figures), {})
        self._updates = [self._update(fragment, revision) for fragment in self.fragments]

    @property
    def size(self) -> int:
        """Parameters of the model."""
        return sum(fragment.size for fragment in self.fragments)

    def update(self, revision: int) -> int:
        """A participant's update from local steps on the state of ``revision``."""
        return self._updates[revision % len(self.fragments)]

    def task(self, kind: str, held: int | None, revision: int) -> int:
        """A task for a participant that holds the state of revision ``held`` and needs that of ``revision``."""
        place = revision % len(self.fragments)
        key = (kind, None if held is None else revision - held, place, len(str(revision)))
        if key not in self._tasks:
            forms = {name: (form.dtype, (form.size,)) for name, form in self._download(held, revision).items()}
            self._tasks[key] = message_bytes(fields_of("task", kind, revision, self._asks(kind, revision)), forms)
        return self._tasks[key]

    def step(self, place: int) -> Forms:
        """What participants are told of an outer step on a fragment: of ``delta`` the most that it can be."""
        fragment, download = self.fragments[place], self.recipe.updates.download
        match download:
            case QuantizedDownload(bits=bits, block=block):
                return update_forms((Quantize(bits=bits, block=block),), fragment.layout)
            case DeltaDownload():
                values = {"values": Form("F32", most_changed(self.recipe, fragment))}
                sparse = {"bitmap": Form("U8", packed(fragment.size, 1)), **values}
                whole = {"values": Form("F32", fragment.size)}
                return min(sparse, whole, key=payload_bytes)
            case FullDownload():
                return {"values": Form("F32", fragment.size)}

    def _download(self, held: int | None, revision: int) -> Forms:
        """The rule of `potluck.updates.download.Downloads`."""
        count, download = len(self.fragments), self.recipe.updates.download
        whole = {"parameters": Form("F32", self.size)}
        if held == revision:
            return {}
        if held is None or (isinstance(download, FullDownload) and revision - held >= count):
            return whole
        missed = range(held + 1, revision + 1)
        if isinstance(download, FullDownload):
            places = sorted({(number - 1) % count for number in missed})
            return {f"fragment-{place}": Form("F32", self.fragments[place].size) for place in places}
        if len(missed) > download.history:
            return whole
        told = {f"{n}.{part}": form for n in missed for part, form in self.step((n - 1) % count).items()}
        return told if payload_bytes(told) < payload_bytes(whole) else whole

    def _asks(self, kind: str, revision: int) -> dict[str, Scalar]:
        if kind == "evaluate":
            return {}
        steps, overlap = self.recipe.steps_of_round(revision + 1)
        first = (revision + 1) * self.recipe.local_steps - steps
        return {"first_step": first, "steps": steps, **({"overlap": overlap} if overlap else {})}

    def _update(self, fragment: Fragment, revision: int) -> int:
        recipe = self.recipe
        if recipe.updates.links or isinstance(recipe.rounds.streaming, Eager):
            forms = update_forms(recipe.updates.links, fragment.layout)
        else:
            forms = {"parameters": Form("F32", fragment.size)}
        steps, batch = recipe.local_steps, recipe.local.batch_size * recipe.local.accumulation
        figures: dict[str, Scalar] = {
            "loss": _LOSS,
            "steps": steps,
            "skipped_steps": 0,
            "tokens": steps * recipe.tokens_per_step,
            "examples": steps * batch,
            "cursor": revision * steps * batch,
            "epoch": 0,
        }
        tensors = {name: (form.dtype, (form.size,)) for name, form in forms.items()}
        return message_bytes(fields_of("contribution", recipe.training_kind, revision, figures), tensors)


def most_changed(recipe: Recipe, fragment: Fragment) -> int:
    """Entries of a fragment that one outer step can change, at most.

    Fewer than all if links send few places and an entry that nobody sent stays as it is; then the union of what all
    participants sent.
    """
    match recipe.outer:
        case OuterSgd(momentum=moves) | OuterSign(weight_decay=moves):
            pass
        case OuterAdam(beta1=moves) | OuterYogi(beta1=moves) | OuterAdagrad(beta1=moves):
            pass
        case _:
            moves = 1.0
    for link in recipe.updates.links:
        if isinstance(link, TopK | BlockTopK | RandomK) and not moves:
            senders = 1 if isinstance(link, RandomK) else recipe.asked_per_round  # all draw the same places
            return min(fragment.size, senders * elements(layout_after(link, fragment.layout)))
    return fragment.size
