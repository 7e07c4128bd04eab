"""Learned deferral under a budget of calls, beside fixed mixtures and simpler rules.

**Models.** The base was trained together by ten participants on half of their documentation (`_silos`). *Far*: the
assistant is the base, trained further on another kind of text, school mathematics (GSM8K), or Python's help texts where
that is not there. *Near*: it is the adapter of one of the ten, another one in each seed.

**Text.** Equal parts of all ten, and for *far* a quarter as much of the assistant's kind: a fifth of all. Gates learn
from text that no model has seen, four stretches in five for the rows and one for the threshold; all is measured on
held-out files. Nats per token, lower is better.

**Rows.** Whatever calls the assistant at some tokens draws there from a mixture of both models. All but the gates get
the weight that is best on the test text itself, and so does the fixed mixture, which asks both at every token.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import _compose_parts as parts
from benchmarks._measure import Measurement, main, measured
from benchmarks._silos import ROOT, BaseSize, Stage, stage
from potluck.compose.base import token_stream
from potluck.compose.decoding.deferral import (
    Foretold,
    Lesson,
    called,
    first_row,
    fixed_mixture,
    foretold,
    learn_gates,
    losses,
    stretches_of,
    threshold_for,
)
from potluck.compose.decoding.models import Here
from potluck.compose.decoding.participants import KIND, question
from potluck.compose.decoding.rows import packed_rows
from potluck.compose.lora import merge_into, train_adapter
from potluck.compose.training import Lesson as Training
from potluck.compose.training import only_training, train_part
from potluck.contribution import Contribution
from potluck.updates.codec import wire_bytes

BUDGET = 0.3
STRETCH = 256  # tokens
Stretch = list[int]
Row = tuple[float, float]  # nats per token, and share of tokens at which the assistant is called


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured.

    Attributes:
        parts: The base and the participants' adapters.
        far: How the assistant for other text is trained.
        learn, test: Stretches of each participant that gates learn from, and that all is measured on.
        judged: Whether targets are; a base that has hardly learnt gains from any second model, at every token.
    """

    parts: parts.Size
    far: Training
    learn: int
    test: int
    judged: bool = True
    gates: Lesson = field(default_factory=Lesson)


SIZES = {
    "short": Size(
        parts=parts.Size(
            base=BaseSize(vocabulary=1024, layers=2, width=64, heads=2, feedforward=176, steps=40, local_steps=20),
            seeds=(0,),
            max_steps=20,
        ),
        far=Training(steps=60, device="cpu"),
        learn=5,
        test=3,
        judged=False,
    ),
    "full": Size(parts=parts.FULL, far=Training(steps=300, learning_rate=1e-3, device="cpu"), learn=8, test=15),
}


def measure(size: Size) -> list[Measurement]:
    found: list[Measurement] = []
    for kind, of in (("far", far), ("near", near)):
        rows = defaultdict[str, list[Row]](list)
        for seed in size.parts.seeds:
            for name, row in rows_of(of(size, seed), replace(size.gates, seed=seed)).items():
                rows[name].append(row)
        for name, pairs in rows.items():
            share = np.mean([share for _, share in pairs])
            peer = f"calls at {share:.1%} of tokens"
            found.append(measured(f"{kind}: {name}", [nats for nats, _ in pairs], "nats per token", peer=peer))
        found += _judged(kind, rows, size.judged)
    return [*found, *_bytes(size)]


def _judged(kind: str, rows: dict[str, list[Row]], judged: bool) -> Iterator[Measurement]:
    """By how much deferral is below each alternative in its worst seed, and the most calls that it made."""
    for peer in ("base", "assistant", "best fixed mixture"):
        worst = max(ours - theirs for (ours, _), (theirs, _) in zip(rows["deferral"], rows[peer], strict=True))
        limit = 0 if judged and kind == "far" else None
        yield measured(f"{kind}: deferral less {peer}, the worst seed", [worst], "nats per token", at_most=limit)
    most = max(share for _, share in rows["deferral"])
    yield measured(f"{kind}: deferral, most calls of a seed", [most], "of tokens", at_most=BUDGET if judged else None)


@dataclass(frozen=True)
class Case:
    """A base and an assistant, and what they say of the text that gates learn from, are tuned on, and of the test."""

    start: Tensor
    learn: Foretold
    tune: Foretold
    test: Foretold


def rows_of(case: Case, lesson: Lesson) -> dict[str, Row]:
    """Every row of the table."""
    tune, test = case.tune, case.test
    width = len(case.start) // 2
    learnt = {
        "deferral": learn_gates(case.learn, case.start, lesson),
        "deferral by the last hidden state alone": learn_gates(case.learn, case.start[:width], lesson),
        "deferral by weak labels alone": learn_gates(case.learn, case.start, replace(lesson, epochs=0)),
    }
    rows: dict[str, Row] = {
        "base": (-float(test.log_p[:, 0].mean()), 0.0),
        "assistant": (-float(test.log_p[:, 1].mean()), 1.0),
        "best fixed mixture": (fixed_mixture(test.log_p)[1], 1.0),
    }
    for name, gates in learnt.items():
        turns = gates.log_turns(test.states)
        threshold = threshold_for(gates.log_turns(tune.states), 0.9 * BUDGET)  # texts differ: some room
        rows[name] = float(losses(turns, test.log_p, threshold).mean()), _share(called(turns) > threshold)
    unbound = learnt["deferral"].log_turns(test.states) + test.log_p
    rows["deferral without a budget"] = -float(unbound.logsumexp(1).mean()), 1.0
    draw = torch.rand(len(test.log_p), generator=torch.Generator().manual_seed(lesson.seed))
    gain = test.log_p[:, 1] - test.log_p[:, 0]
    rows["entropy threshold"] = _mixed_where(test.log_p, test.entropy > tune.entropy.quantile(1 - BUDGET))
    rows["random calls"] = _mixed_where(test.log_p, draw < BUDGET)
    rows["oracle: the calls that gain most"] = _mixed_where(test.log_p, gain > gain.quantile(1 - BUDGET))
    return rows


def _mixed_where(log_p: Tensor, where: Tensor) -> Row:
    """The best mixture at some tokens, the base at all others."""
    total = fixed_mixture(log_p[where])[1] * int(where.sum()) - float(log_p[~where, 0].sum())
    return total / len(log_p), _share(where)


def _share(where: Tensor) -> float:
    return float(where.double().mean())


# --- assistants and texts ----------------------------------------------------------------------


def far(size: Size, seed: int) -> Case:
    """An assistant for text of another kind than the base's."""
    place = stage(seed, size.parts.base)
    texts = other_texts()
    cut = len(texts) * 2 // 3
    train, rest = (token_stream(side, place.base.vocabulary) for side in (texts[:cut], texts[cut:]))
    model = copy.deepcopy(place.base.model)
    with only_training(model, list(model.parameters())):
        train_part(model, [train], replace(size.far, seed=seed))
    quarter = len(place.own) / 4
    theirs = _spread(rest, round(quarter * (size.learn + size.test)))
    learn = round(quarter * size.learn)
    return _case(place, size, model, (theirs[:learn], theirs[learn:]))


def near(size: Size, seed: int) -> Case:
    """A participant's own adapter, another participant's in each seed."""
    place = stage(seed, size.parts.base)
    own = list(place.own.values())[seed % len(place.own)]
    model = copy.deepcopy(place.base.model)
    merge_into(model, train_adapter(place.base, [own], size.parts.lesson(len(own), seed), size.parts.rank))
    return _case(place, size, model, ([], []))


def _case(place: Stage, size: Size, model: PreTrainedModel, more: tuple[list[Stretch], list[Stretch]]) -> Case:
    """What both models say of everybody's text and of more, for the gates and for the test."""
    vocabulary = place.base.vocabulary
    base, assistant = (Here(n, m, vocabulary.size) for n, m in (("base", place.base.model), ("assistant", model)))
    given = [_spread(stream, size.learn) for stream in place.tuning.values()] + [more[0]]
    learn = [stretch for each in given for at, stretch in enumerate(each) if at % 5 != 4]
    tune = [stretch for each in given for stretch in each[4::5]]
    test = [stretch for stream in place.held_out.values() for stretch in _spread(stream, size.test)] + more[1]
    return Case(first_row(place.base), *(foretold(base, [assistant], each) for each in (learn, tune, test)))


def _spread(stream: np.ndarray, count: int) -> list[Stretch]:
    """So many stretches, evenly from all of a text."""
    whole = [stretch for stretch in stretches_of(stream, STRETCH) if len(stretch) == STRETCH + 1]
    return [whole[at * len(whole) // count] for at in range(count)] if len(whole) >= count else whole


def other_texts() -> list[str]:
    """School mathematics, questions with their answers; or what Python's ``help`` says of its topics."""
    given = [ROOT.parent / "shared/data/gsm8k/train.jsonl", ROOT / "runs/silos/gsm8k/train.jsonl"]
    for path in given:
        if path.is_file():
            examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:3000]]
            return [f"{example['question']}\n{example['answer']}" for example in examples]
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


# --- bytes -------------------------------------------------------------------------------------


def _bytes(size: Size) -> Iterator[Measurement]:
    """What a call costs where the assistant is a participant: a question after 256 tokens, and its answer."""
    row = torch.zeros(1, size.parts.base.vocabulary).log_softmax(-1)
    for top, what in ((0, "all log-probabilities"), (20, "the 20 likeliest")):
        answer = Contribution(kind=KIND, revision=0, header={"tokens": 256}, tensors=packed_rows(row, top))
        total = wire_bytes(question([1] * 256, 1, top, False, None)) + wire_bytes(answer)
        yield measured(f"a call behind a participant, {what} of {row.numel()}", [total], "bytes")


if __name__ == "__main__":
    main(measure, SIZES)
