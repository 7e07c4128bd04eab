"""Learned deferral under a budget of calls, beside fixed mixtures and simpler rules.

**Setting.** Ten participants' documentation (`_silos`). The base was trained together on eight of them; the assistant
is the base, trained further on half of the text of the other two, which the base never saw. Gates learn from a little
text of all ten that neither was trained on, 4/5 for the rows and 1/5 for the threshold, and everything is measured on
held-out files: equal parts of all ten, so a fifth is the assistant's. Nats per token, lower is better.

**Rows.** Whatever calls the assistant at some tokens draws there from a mixture of both models; all but the gates get
the weight that is best on the test text itself, and the fixed mixture, which asks both at every token, does, too.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks._measure import Measurement, main, measured
from benchmarks._silos import BaseSize, Stage, stage, texts
from potluck.compose import training
from potluck.compose.base import token_stream
from potluck.compose.decoding.deferral import (
    Foretold,
    Lesson,
    called,
    fixed_mixture,
    foretold,
    learn_gates,
    losses,
    mean_row,
    stretches_of,
    threshold_for,
)
from potluck.compose.decoding.models import Here
from potluck.compose.decoding.participants import KIND, question
from potluck.compose.decoding.rows import packed_rows
from potluck.contribution import Contribution
from potluck.updates.codec import wire_bytes

BUDGET = 0.3
STRETCH = 128  # tokens
Stretch = list[int]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        base: Its ``parties`` are those whose text the base saw.
        parties: All of them; the assistant is trained on the rest.
        assistant: How.
        learn, test: Stretches of each participant that gates learn from, and that all is measured on.
    """

    seeds: tuple[int, ...]
    base: BaseSize
    parties: int
    assistant: training.Lesson
    learn: int
    test: int
    gates: Lesson = field(default_factory=Lesson)


SIZES = {
    "short": Size(
        seeds=(0,),
        base=BaseSize(vocabulary=1024, layers=2, width=64, heads=2, feedforward=176, steps=40, batch_size=4, parties=8),
        parties=10,
        assistant=training.Lesson(steps=60, batch_size=8, device="cpu"),
        learn=15,
        test=5,
    ),
    "full": Size(
        seeds=(0, 1, 2),
        base=BaseSize(parties=8),
        parties=10,
        assistant=training.Lesson(steps=300, batch_size=8, device="cpu"),
        learn=60,
        test=30,
    ),
}


def measure(size: Size) -> list[Measurement]:
    rows = defaultdict[str, list[float]](list)
    shares = defaultdict[str, list[float]](list)
    for seed in size.seeds:
        for name, (nats, share) in of_seed(size, seed).items():
            rows[name].append(nats)
            shares[name].append(share)
    found = [
        measured(name, nats, "nats per token", peer=f"calls at {np.median(shares[name]):.0%} of tokens")
        for name, nats in rows.items()
    ]
    for peer in ("base", "assistant", "best fixed mixture"):
        worst = max(ours - theirs for ours, theirs in zip(rows["deferral"], rows[peer], strict=True))
        found.append(measured(f"deferral less {peer}, the worst seed", [worst], "nats per token", at_most=0))
    found.append(measured("deferral, most calls of a seed", [max(shares["deferral"])], "of tokens", at_most=BUDGET))
    return [*found, *_bytes(size)]


def of_seed(size: Size, seed: int) -> dict[str, tuple[float, float]]:
    """Nats per token and share of calls of every row."""
    learn, tune, test = everything_foretold(size, seed)
    lesson = replace(size.gates, seed=seed)
    gates = learn_gates(learn[0], learn[1], lesson)
    weak = learn_gates(learn[0], learn[1], replace(lesson, epochs=0))
    turns = gates.log_turns(test.hidden)
    draw = torch.rand(len(test.log_p), generator=torch.Generator().manual_seed(seed))
    gain = test.log_p[:, 1] - test.log_p[:, 0]
    scores: dict[str, tuple[Tensor, Tensor]] = {  # on the text that sets the threshold, and on the test
        "weak labels alone": tuple(called(weak.log_turns(t.hidden)) for t in (tune, test)),
        "entropy threshold": (tune.entropy, test.entropy),
        "random calls": (draw, draw),
        "oracle: the calls that gain most": (gain, gain),
    }
    threshold = threshold_for(gates.log_turns(tune.hidden), BUDGET)
    share = float((called(turns) > threshold).float().mean())
    rows = {
        "base": (-float(test.log_p[:, 0].mean()), 0.0),
        "assistant": (-float(test.log_p[:, 1].mean()), 1.0),
        "best fixed mixture": (fixed_mixture(test.log_p)[1], 1.0),
        "deferral": (float(losses(turns, test.log_p, threshold).mean()), share),
        "deferral without a budget": (-float((turns + test.log_p).logsumexp(1).mean()), 1.0),
    }
    return rows | {name: _mixed_where(test.log_p, *both) for name, both in scores.items()}


def _mixed_where(log_p: Tensor, tuning: Tensor, score: Tensor) -> tuple[float, float]:
    """The best mixture at the tokens of the highest scores, the base at all others."""
    where = score > tuning.quantile(1 - BUDGET)
    total = fixed_mixture(log_p[where])[1] * int(where.sum()) - float(log_p[~where, 0].sum())
    return total / len(log_p), float(where.float().mean())


def everything_foretold(size: Size, seed: int) -> tuple[tuple[Foretold, Tensor], Foretold, Foretold]:
    """Base and assistant of a seed, and what they say: to learn from, with where rows begin; to tune; to test."""
    prepared = stage(seed, size.base)
    everybody = texts(size.parties)
    vocabulary = prepared.base.vocabulary
    others = [name for name in everybody if name not in prepared.own]
    own = [token_stream(everybody[name].base, vocabulary) for name in others]
    base = Here("base", prepared.base.model, vocabulary.size)
    assistant = Here("assistant", _trained_on(prepared, own, replace(size.assistant, seed=seed)), vocabulary.size)
    learn, tune, test = list[Stretch](), list[Stretch](), list[Stretch]()
    for them in everybody.values():
        given = _spread(token_stream(them.own, vocabulary), size.learn)
        learn += [stretch for at, stretch in enumerate(given) if at % 5 != 4]
        tune += given[4::5]
        test += _spread(token_stream(them.held_out, vocabulary), size.test)
    said = [foretold(base, [assistant], stretches) for stretches in (learn, tune, test)]
    return (said[0], mean_row(prepared.base)), said[1], said[2]


def _spread(stream: np.ndarray, count: int) -> list[Stretch]:
    """So many stretches, evenly from all of a text."""
    whole = [stretch for stretch in stretches_of(stream, STRETCH) if len(stretch) == STRETCH + 1]
    return [whole[at * len(whole) // count] for at in range(min(count, len(whole)))]


def _trained_on(prepared: Stage, streams: list[np.ndarray], lesson: training.Lesson) -> PreTrainedModel:
    """A copy of the base, all of it trained further; a step takes a batch of each stream."""
    model = copy.deepcopy(prepared.base.model)
    with training.only_training(model, list(model.parameters())):
        training.train_part(model, streams, lesson)
    return model


def _bytes(size: Size) -> Iterator[Measurement]:
    """What a call costs where the assistant is a participant: a question after 256 tokens, and its answer."""
    row = torch.zeros(1, size.base.vocabulary).log_softmax(-1)
    for top, what in ((0, "all log-probabilities"), (20, "the 20 likeliest")):
        answer = Contribution(kind=KIND, revision=0, header={"tokens": 256}, tensors=packed_rows(row, top))
        total = wire_bytes(question([1] * 256, 1, top, False, None)) + wire_bytes(answer)
        yield measured(f"a call behind a participant, {what} of {row.numel()}", [total], "bytes")


if __name__ == "__main__":
    main(measure, SIZES)
