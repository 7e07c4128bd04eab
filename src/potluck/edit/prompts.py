"""Prompts as rows of tokens: where the subject ends, where the answer begins; and what a model answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from potluck.compose.base import Base
from potluck.corpus.tokenizer import Vocabulary
from potluck.edit.facts import begin_of
from potluck.errors import EditError

MAX_ANSWER = 24  # tokens that an answer may have when nothing is expected
MARGIN = 8  # tokens that an answer may have beyond what is expected
_NEUTRAL = (".", "a", "\n")  # texts that an answer is encoded after, where the tokenizer joins it with its prompt
Choice = Callable[[Tensor, Sequence[int]], Tensor]  # next tokens (B, 1) of logits (B, V), and of which rows they are


@dataclass(frozen=True)
class Row:
    """One text as tokens, begun as the base's own tokenizer begins a text.

    Attributes:
        ids: All tokens.
        prompt: How many of them are the prompt; the others are the answer.
        subject: Position of the subject's last token; -1 if there is none.
        first: Position of the subject's first token; -1 if there is none.
    """

    ids: tuple[int, ...]
    prompt: int
    subject: int = -1
    first: int = -1


@dataclass(frozen=True)
class Rows:
    """Several texts, padded at the right, where a causal model does not look.

    Attributes:
        ids, mask: ``(B, T)``.
        labels: ``(B, T)``: the token that each position shall foretell if it is one of the answer, else -100.
        subject: Position of the subject's last token, ``(B,)``.
        last: Position of the prompt's last token, ``(B,)``.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    subject: Tensor
    last: Tensor

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(*(getattr(self, name).to(device) for name in ("ids", "mask", "labels", "subject", "last")))


def row(
    vocabulary: Vocabulary,
    prompt: str,
    answer: str = "",
    subject: str = "",
    before: str = "",
    place: int | None = None,
) -> Row:
    """A prompt, its answer after a space, and a text before both.

    The subject's tokens are those that hold any of its characters: where one character is several tokens, its last
    token is the last of them.

    Args:
        vocabulary: The base's.
        prompt: What the answer follows.
        answer: Encoded as what follows the prompt (`continuation`).
        subject: Whose tokens are looked for; none are if it is empty.
        before: A text before the prompt.
        place: Where in the prompt the subject begins, in characters; `begin_of` if left out.

    Raises:
        EditError: The subject is not in the prompt, or the tokenizer does not say where it is or how to go on.
    """
    begun = f"{before} {prompt}" if before else prompt
    encoding = vocabulary.tokenizer.encode(begun, add_special_tokens=False)
    start = vocabulary.beginning if encoding.ids else tuple(vocabulary.prompt(""))
    ids, first, last = [*start, *encoding.ids], -1, -1
    if subject:
        at = begin_of(prompt, subject) if place is None else place
        if at < 0 or prompt[at : at + len(subject)] != subject:
            raise EditError(f"{subject!r} is not in {prompt!r}")
        at += len(begun) - len(prompt)
        end = at + len(subject)
        tokens = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > at]
        if not tokens or encoding.offsets[tokens[-1]][1] < end:
            raise EditError(f"the tokenizer does not say where {subject!r} is in {begun!r}")
        first, last = len(start) + tokens[0], len(start) + tokens[-1]
    prompt_tokens = len(ids)
    if answer.strip():
        ids += _continued_by(vocabulary, begun, encoding.ids, answer)
    return Row(tuple(ids), prompt_tokens, last, first)


def continuation(vocabulary: Vocabulary, prompt: str, answer: str) -> tuple[int, ...]:
    """An answer's tokens as what follows a prompt and a space.

    Both are encoded as one text, and what follows the prompt's own tokens is taken: a tokenizer that puts a space
    before every text would give an answer that is encoded apart two of them.

    Raises:
        EditError: No tokens after the prompt's make the answer.
    """
    return tuple(
        _continued_by(vocabulary, prompt, vocabulary.tokenizer.encode(prompt, add_special_tokens=False).ids, answer)
    )


def _continued_by(vocabulary: Vocabulary, prompt: str, ids: Sequence[int], answer: str) -> list[int]:
    tokenizer, ids = vocabulary.tokenizer, list(ids)

    def after(text: str, own: list[int]) -> list[int] | None:
        gap = "" if not text or text[-1].isspace() else " "
        whole: list[int] = tokenizer.encode(f"{text}{gap}{answer.strip()}", add_special_tokens=False).ids
        return whole[len(own) :] if whole[: len(own)] == own and len(whole) > len(own) else None

    if (found := after(prompt, ids)) is not None:
        return found
    gap = "" if prompt[-1:].isspace() else " "
    wanted = tokenizer.decode(tokenizer.encode(f"{prompt}{gap}{answer.strip()}", add_special_tokens=False).ids)
    for neutral in _NEUTRAL if gap else ("\n",):
        found = after(neutral, tokenizer.encode(neutral, add_special_tokens=False).ids)
        if found and tokenizer.decode([*ids, *found]) == wanted:
            return found
    raise EditError(f"the tokenizer does not say how {answer!r} follows {prompt!r}", "change the prompt's last word")


def rows_of(rows: Sequence[Row], pad: int) -> Rows:
    """Rows side by side."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = 1
        labels[i, row.prompt - 1 : n - 1] = torch.tensor(row.ids[row.prompt :], dtype=torch.int64)
    subject = torch.tensor([row.subject for row in rows])
    return Rows(ids, mask, labels, subject, torch.tensor([row.prompt - 1 for row in rows]))


def logits_of(model: PreTrainedModel, rows: Rows) -> Tensor:
    """``(B, T, V)`` in fp32."""
    found: Tensor = model(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).logits
    return found.float()


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each row's answer, nats a token, ``(B,)``."""
    nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return nats.sum(1) / (labels != -100).sum(1).clamp(min=1)


def told(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each token of a row's answer is the likeliest where it stands: share of them, ``(B,)``."""
    counted = labels != -100
    return ((logits.argmax(-1) == labels) & counted).sum(1) / counted.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Answer:
    """What a model said after a prompt.

    Attributes:
        tokens: Up to the token that ended it, without that one.
        text: The same as text, without space around it.
        ended: Whether the model ended it; else it was cut.
    """

    tokens: tuple[int, ...]
    text: str
    ended: bool


def answers(base: Base, prompts: Sequence[str], batch_size: int = 16, max_tokens: int = MAX_ANSWER) -> list[str]:
    """Texts of `said`; `potluck.edit.judging` says whether they are what was expected."""
    return [answer.text for answer in said(base, prompts, batch_size, max_tokens)]


def said(
    base: Base,
    prompts: Sequence[str],
    batch_size: int = 16,
    max_tokens: int = MAX_ANSWER,
    choose: Choice | None = None,
) -> list[Answer]:
    """What the model says by itself after each prompt, up to a token that ends texts, or so many tokens.

    Nothing of an expected answer is given, no tokens of it (arXiv 2502.11177), and nothing is cut at a full stop, which
    an answer may hold. Prompts of one length go together, so that none is padded and the size of a batch changes
    nothing but speed. Where the model's context is full, the answer ends.

    Args:
        base: The model.
        prompts: What answers follow.
        batch_size: Prompts side by side.
        max_tokens: Of one answer. To ask whether it is an expected one, the longest of those and `MARGIN`.
        choose: How the next token is chosen; the likeliest if left out.

    Raises:
        EditError: A prompt is longer than the model's context.
    """
    rows = [row(base.vocabulary, prompt) for prompt in prompts]
    found: dict[int, Answer] = {}
    for places in _alike(rows, batch_size):
        ids = torch.tensor([rows[i].ids for i in places], device=base.model.device)
        room = getattr(base.model.config, "max_position_embeddings", None) or ids.shape[1] + max_tokens
        if ids.shape[1] > room:
            raise EditError(f"a prompt of {ids.shape[1]} tokens: {prompts[places[0]][:80]!r}", f"at most {room} fit")
        steps = min(max_tokens, room - ids.shape[1] + 1)
        found |= zip(places, _continued(base, ids, steps, places, choose or _likeliest), strict=True)
    return [found[i] for i in range(len(rows))]


def _likeliest(logits: Tensor, places: Sequence[int]) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def _alike(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Places of rows of one length, a batch at a time."""
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row.ids), []).append(i)
    for places in lengths.values():
        for begin in range(0, len(places), batch_size):
            yield places[begin : begin + batch_size]


@torch.inference_mode()
def _continued(base: Base, ids: Tensor, max_tokens: int, places: Sequence[int], choose: Choice) -> list[Answer]:
    """Continuations of prompts of one length, with a cache of keys and values."""
    model, vocabulary = base.model, base.vocabulary
    tokens: list[list[int]] = [[] for _ in ids]
    open_rows, cache, step = set(range(len(ids))), None, ids
    for _ in range(max_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step = choose(out.logits[:, -1].float(), places).to(ids.device)
        for i in tuple(open_rows):
            token = int(step[i])
            if token in vocabulary.stops:
                open_rows.discard(i)
            else:
                tokens[i].append(token)
        if not open_rows:
            break
    texts = [vocabulary.tokenizer.decode(own, skip_special_tokens=False).strip() for own in tokens]
    return [
        Answer(tuple(own), text, i not in open_rows) for i, (own, text) in enumerate(zip(tokens, texts, strict=True))
    ]
