"""Prompts as rows of tokens: where the subject ends, where the answer begins; and what a model answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from potluck.compose.base import Base
from potluck.corpus.tokenizer import Vocabulary
from potluck.errors import EditError

MAX_ANSWER = 24  # tokens that an answer may have when nothing is expected
STOPS = (".", "\n", ";")


@dataclass(frozen=True)
class Row:
    """One text as tokens, begun by the end-of-text token as in training.

    Attributes:
        ids: All tokens.
        prompt: How many of them are the prompt; the others are the answer.
        subject: Position of the subject's last token; -1 if there is none.
    """

    ids: tuple[int, ...]
    prompt: int
    subject: int = -1


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


def row(vocabulary: Vocabulary, prompt: str, answer: str = "", subject: str = "", before: str = "") -> Row:
    """A prompt, its answer after a space, and a text before both.

    Raises:
        EditError: The subject is not in the prompt, or the tokenizer joins it with what follows.
    """
    begun = f"{before} {prompt}" if before else prompt
    encoding = vocabulary.tokenizer.encode(begun, add_special_tokens=False)
    ids, position = [vocabulary.end_of_text, *encoding.ids], -1
    if subject:
        at = begun.rfind(subject)
        if at < 0:
            raise EditError(f"{subject!r} is not in {begun!r}")
        end = at + len(subject) - 1
        position = next((i for i, (a, b) in enumerate(encoding.offsets) if a <= end < b), -2) + 1
        if position < 0:
            raise EditError(f"the tokenizer does not say where {subject!r} is in {begun!r}")
    prompt_tokens = len(ids)
    if answer:
        ids += vocabulary.tokenizer.encode(f" {answer}", add_special_tokens=False).ids
    return Row(tuple(ids), prompt_tokens, position)


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


def answers(
    base: Base,
    prompts: Sequence[str],
    batch_size: int = 16,
    max_tokens: int = MAX_ANSWER,
    stops: Sequence[str] = STOPS,
) -> list[str]:
    """What the model says by itself after each prompt: greedily, up to a full stop, a new line or the end of the text.

    Nothing of an expected answer is given, neither tokens nor length (arXiv 2502.11177). Prompts of one length go
    together, so that none is padded and the size of a batch changes nothing but speed.
    """
    rows = [row(base.vocabulary, prompt) for prompt in prompts]
    found = [""] * len(rows)
    for places in _alike(rows, batch_size):
        ids = torch.tensor([rows[i].ids for i in places], device=base.model.device)
        for i, text in zip(places, _continued(base, ids, max_tokens, stops), strict=True):
            found[i] = text
    return found


def _alike(rows: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Places of rows of one length, a batch at a time."""
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row.ids), []).append(i)
    for places in lengths.values():
        for begin in range(0, len(places), batch_size):
            yield places[begin : begin + batch_size]


@torch.inference_mode()
def _continued(base: Base, ids: Tensor, max_tokens: int, stops: Sequence[str]) -> list[str]:
    """Greedy continuations of prompts of one length, with a cache of keys and values."""
    model, vocabulary = base.model, base.vocabulary
    said: list[list[int]] = [[] for _ in ids]
    open_rows, cache, step = set(range(len(ids))), None, ids
    for _ in range(max_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step = out.logits[:, -1].argmax(-1, keepdim=True)
        for i in tuple(open_rows):
            token = int(step[i])
            said[i].append(token)
            if token == vocabulary.end_of_text or any(s in vocabulary.tokenizer.decode([token]) for s in stops):
                open_rows.discard(i)
        if not open_rows:
            break
    return [_ended(vocabulary, tokens, stops) for tokens in said]


def _ended(vocabulary: Vocabulary, tokens: list[int], stops: Sequence[str]) -> str:
    if vocabulary.end_of_text in tokens:
        tokens = tokens[: tokens.index(vocabulary.end_of_text)]
    text: str = vocabulary.tokenizer.decode(tokens)
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text.strip()
