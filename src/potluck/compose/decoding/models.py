"""What foretells the next token: one protocol, and a model of this process that fulfils it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from potluck.errors import ModelError

_NUMBERS_AT_ONCE = 1 << 26  # 256 MiB of log-probabilities in fp32
_FADES = 0.98  # what a token counts one token later, in the mean of hidden states: a memory of some 50 tokens


@dataclass
class Counts:
    """What was asked of one model so far.

    Attributes:
        calls: Questions asked.
        predictions: Tokens that they asked a distribution of.
        sent_bytes, received_bytes: Of questions and answers as they travelled; 0 in this process.
        seconds: Waited for answers.
    """

    calls: int = 0
    predictions: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0

    @contextmanager
    def asking(self, predictions: int) -> Iterator[None]:
        """Count a question; whoever asks adds the bytes."""
        began = time.perf_counter()
        self.calls += 1
        self.predictions += predictions
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    def since(self, before: Counts) -> Counts:
        """What was asked after ``before`` was noted."""
        return Counts(*(now - then for now, then in zip(asdict(self).values(), asdict(before).values(), strict=True)))


@dataclass(frozen=True)
class Gold:
    """How a model foretells the tokens that a text has.

    Attributes:
        log_p: Log-probability of each, nats, fp32 ``(n,)``.
        right: Whether it is the model's likeliest, ``(n,)``.
    """

    log_p: Tensor
    right: Tensor


class NextToken(Protocol):
    """A model that is asked for next tokens; where it is does not matter.

    Attributes:
        name: What reports call it.
        vocabulary: Tokens that it tells apart; an endpoint's is taken to be the base's.
        whole: Whether its rows have every token's log-probability; else only the likeliest ones', and -inf elsewhere.
        counts: What it was asked so far.
    """

    name: str
    vocabulary: int
    whole: bool
    counts: Counts

    def log_probs(self, tokens: Sequence[int], positions: int = 1) -> Tensor:
        """The next token after each of the last prefixes.

        Row -1 is what comes after all of ``tokens``, row -2 what comes after all but the last, and so on.

        Returns:
            Nats, fp32 ``(positions, V)``.

        Raises:
            ModelError: There is no token, or there are more than its context holds.
            EngineError: It is elsewhere, and does not answer as it should.
        """

    def gold(self, tokens: Sequence[int]) -> Gold:
        """How it foretells ``tokens[1:]``, each from those before it; raises what ``log_probs`` raises."""


class Here:
    """A model in this process.

    It keeps the keys and values of what it saw last. A question that begins like the last one costs the tokens that
    are new: decoding goes on, and speculation goes back, without being told to.

    Args:
        name: What reports call it.
        model: In evaluation mode, on any device.
        vocabulary: Tokens of its tokenizer; rows of the head beyond them say nothing.
    """

    whole = True

    def __init__(self, name: str, model: PreTrainedModel, vocabulary: int) -> None:
        self.name, self.model, self.vocabulary = name, model, vocabulary
        self.counts = Counts()
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 62)
        self._seen: list[int] = []
        self._sums: list[Tensor] = []  # after each token seen, of the hidden states up to it, the older fading
        self._cache: Any = None

    def log_probs(self, tokens: Sequence[int], positions: int = 1) -> Tensor:
        """The next token after each of the last prefixes, nats, ``(positions, V)``."""
        return self.look(tokens, positions)[0]

    def look(self, tokens: Sequence[int], positions: int = 1) -> tuple[Tensor, Tensor]:
        """``log_probs``, and the model's state at each position, ``(positions, 2 d)``.

        A state is the hidden state h_t that the output head turns into the row, and after it what the text was like so
        far: ``m_t = Σ_s γ^(t - s) h_s / Σ_s γ^(t - s)`` with γ = 0.98.
        """
        check_question(tokens, positions, self.vocabulary)
        if len(tokens) > self.context:
            raise ModelError(f"{self.name}: {len(tokens)} tokens, its context holds {self.context}")
        with self.counts.asking(positions), torch.no_grad():  # gates learn from what comes out
            kept = self._keep(tokens, len(tokens) - positions)
            cache, self._cache, self._seen = self._cache, None, []  # a failure must not leave half of it
            output = self.model(
                input_ids=torch.tensor([tokens[kept:]], device=self.model.device),
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
                logits_to_keep=positions,
            )
            rows = output.logits[0, -positions:, : self.vocabulary].float().log_softmax(dim=-1)
            hidden = output.hidden_states[-1][0].float().cpu()
            means = self._means(hidden, kept)[-positions:]
            self._cache, self._seen = output.past_key_values, list(tokens)
            return rows.cpu(), torch.cat([hidden[-positions:], means], dim=1)

    def gold(self, tokens: Sequence[int]) -> Gold:
        """How it foretells ``tokens[1:]``."""
        at_once = max(1, _NUMBERS_AT_ONCE // self.vocabulary)
        ends = [*range(at_once, len(tokens) - 1, at_once), len(tokens) - 1]
        starts = [0, *ends[:-1]]
        parts = [
            gold_of(self.log_probs(tokens[:end], end - start), tokens[start + 1 : end + 1])
            for start, end in zip(starts, ends, strict=True)
        ]
        return Gold(torch.cat([part.log_p for part in parts]), torch.cat([part.right for part in parts]))

    def _means(self, hidden: Tensor, kept: int) -> Tensor:
        """The fading mean after each new token, from the sum after the last that was kept."""
        del self._sums[kept:]
        for state in hidden:
            self._sums.append(state + _FADES * self._sums[-1] if self._sums else state)
        counts = torch.arange(kept + 1, kept + 1 + len(hidden))
        weights = (1 - _FADES**counts) / (1 - _FADES)
        return torch.stack(self._sums[kept:]) / weights[:, None]

    def _keep(self, tokens: Sequence[int], at_most: int) -> int:
        """How many of the tokens the cache holds, after what does not belong to them is taken out of it."""
        common = 0
        while common < min(at_most, len(self._seen)) and self._seen[common] == tokens[common]:
            common += 1
        if common < len(self._seen):
            try:
                self._cache.crop(common - len(self._seen))  # negative: how many go
            except (AttributeError, NotImplementedError, ValueError):  # sliding windows, recurrent states
                self._cache, common = None, 0
        return common


def gold_of(rows: Tensor, tokens: Sequence[int]) -> Gold:
    """How rows ``(n, V)`` foretell the n tokens that came."""
    came = torch.tensor(tokens, dtype=torch.int64)
    return Gold(rows.gather(1, came[:, None]).squeeze(1), rows.argmax(dim=1) == came)


def check_question(tokens: Sequence[int], positions: int, vocabulary: int) -> None:
    """Hold a question to what can be asked.

    Raises:
        ModelError: It has no tokens or such as the model does not know, or asks for more positions than tokens.
    """
    if not 1 <= positions <= len(tokens):
        raise ModelError(f"{positions} predictions after {len(tokens)} tokens")
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise ModelError(f"tokens {min(tokens)} to {max(tokens)} in a vocabulary of {vocabulary}")
