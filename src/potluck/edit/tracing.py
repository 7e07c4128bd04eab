"""Causal tracing: where a model keeps the facts that it knows (arXiv 2202.05262).

The subject's tokens are blurred by noise, so that the model no longer knows the answer. Then one thing at a time is put
back to what it was: a layer's output, or a window of layers' MLP or attention outputs, at one token. How much of the
answer's probability comes back says what passes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potluck.compose.base import Base
from potluck.edit.facts import Edit
from potluck.edit.judging import begins
from potluck.edit.layout import Layout, first, layout_of, watching
from potluck.edit.prompts import MARGIN, continuation, row, said
from potluck.errors import EditError

PLACES = ("first of subject", "middle of subject", "last of subject", "next", "further", "last of prompt")
_ENDS = ("last of subject", "last of prompt")
KINDS = ("layer", "mlp", "attention")
_ATTENTION = {"model.layers": "self_attn", "transformer.h": "attn"}


@dataclass(frozen=True)
class Trace:
    """Mean over facts.

    Attributes:
        known: Facts whose answer the model's own answer begins with, token by token; only they were traced.
        asked: Facts in all.
        clean, blurred: Probability of the answer's first token without and with noise.
        restored: Of each kind, the probability after putting back each place at each layer, ``(places, layers)``.
        window: Layers in a window of MLP or attention outputs.
    """

    known: int
    asked: int
    clean: float
    blurred: float
    restored: Mapping[str, Tensor]
    window: int

    @property
    def at(self) -> Literal["subject", "prompt"]:
        """Which token to edit: the one whose MLPs bring back more, the subject's last or the prompt's."""
        subject, prompt = (float(self.restored["mlp"][PLACES.index(place)].max()) for place in _ENDS)
        return "subject" if subject >= prompt else "prompt"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers to edit: where MLPs at the edited token bring back most, and neighbours half as good.

        The last layer is left out: nothing comes after it that could use what it says.
        """
        end = _ENDS[0] if self.at == "subject" else _ENDS[1]
        effect = (self.restored["mlp"][PLACES.index(end)] - self.blurred)[:-1]
        peak = int(effect.argmax())
        enough = effect >= effect[peak] / 2
        low = high = peak
        while low > 0 and enough[low - 1]:
            low -= 1
        while high + 1 < len(effect) and enough[high + 1]:
            high += 1
        return tuple(range(low, high + 1))


def causal_trace(
    base: Base,
    facts: Sequence[Edit],
    window: int | None = None,
    noise: float = 3.0,
    draws: int = 10,
    seed: int = 0,
    on_fact: Callable[[int], None] = lambda number: None,
) -> Trace:
    """Trace facts, each given as an edit whose target is true.

    Args:
        window: Layers of MLP or attention outputs put back together; a quarter of the model's if left out.
        noise: Standard deviation, in that of the embedding matrix.
        draws: Of noise, for every fact.

    Raises:
        EditError: The model knows none of the facts.
        ModelError: Its layout is not known.
    """
    layout = layout_of(base.model)
    known = _known(base, facts)
    if not known:
        raise EditError(f"the model answers none of {len(facts)} facts rightly", "there is nothing to trace in it")
    window = window or max(1, layout.count // 4)
    spread = float(base.model.get_input_embeddings().weight.detach().float().std()) * noise  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    totals = {kind: torch.zeros(len(PLACES), layout.count) for kind in KINDS}
    counts, clean, blurred = torch.zeros(len(PLACES)), 0.0, 0.0
    for number, fact in enumerate(known):
        on_fact(number)
        one = _Traced(base, layout, fact, spread, draws, generator)
        clean, blurred = clean + one.clean, blurred + one.probability({})
        for token in range(one.begin, one.length):
            place = one.place(token)
            counts[place] += 1
            for layer in range(layout.count):
                totals["layer"][place, layer] += one.probability({("layer", layer): token})
                around = range(max(0, layer - window // 2), min(layout.count, layer - window // 2 + window))
                for kind in KINDS[1:]:
                    totals[kind][place, layer] += one.probability({(kind, at): token for at in around})
    restored = {kind: total / counts[:, None].clamp(min=1) for kind, total in totals.items()}
    return Trace(len(known), len(facts), clean / len(known), blurred / len(known), restored, window)


def _known(base: Base, facts: Sequence[Edit]) -> list[Edit]:
    """Facts whose answer is, token by token, what the model's own answer begins with: its first token is traced."""
    wanted = [continuation(base.vocabulary, fact.prompt, fact.target) for fact in facts]
    found = said(base, [fact.prompt for fact in facts], max_tokens=max(map(len, wanted), default=0) + MARGIN)
    return [
        fact
        for fact, tokens, answer in zip(facts, wanted, found, strict=True)
        if answer.tokens[: len(tokens)] == tokens and begins(answer.text, fact.target)
    ]


class _Traced:
    """One fact: what the clean run gave, and the blurred runs with parts of it put back."""

    def __init__(
        self, base: Base, layout: Layout, fact: Edit, spread: float, draws: int, generator: torch.Generator
    ) -> None:
        self.base, self.layout = base, layout
        tokens = row(base.vocabulary, fact.prompt, fact.target, fact.subject, place=fact.place)
        self.length, self.begin, self.last = tokens.prompt, tokens.first, tokens.subject
        self.answer = tokens.ids[tokens.prompt]
        self.ids = torch.tensor([tokens.ids[: tokens.prompt]], device=base.model.device)
        self.kept: dict[tuple[str, int], Tensor] = {}
        modules = {(kind, i): _module(layout, kind, i) for kind in KINDS for i in range(layout.count)}
        self.modules = modules
        with ExitStack() as stack, torch.inference_mode():
            for key, module in modules.items():
                stack.enter_context(watching({0: module}, lambda _, x, y, key=key: self.kept.update({key: y[0]})))  # type: ignore[misc]
            self.clean = self._of_answer(base.model(input_ids=self.ids, use_cache=False).logits)
        width = base.model.get_input_embeddings()(self.ids).shape[-1]
        noise = torch.randn(draws, self.last + 1 - self.begin, width, generator=generator) * spread
        self.noise = noise.to(base.model.device)

    def place(self, token: int) -> int:
        """Which of `PLACES` a token is."""
        if token == self.last:
            return 2
        if token < self.last:
            return 0 if token == self.begin else 1
        return 5 if token == self.length - 1 else 3 if token == self.last + 1 else 4

    @torch.inference_mode()
    def probability(self, restored: Mapping[tuple[str, int], int]) -> float:
        """Of the answer's first token, with the subject blurred and these outputs put back at these tokens."""
        model = self.base.model

        def blur(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output.clone()
            output[:, self.begin : self.last + 1] += self.noise
            return output

        with ExitStack() as stack:
            stack.callback(model.get_input_embeddings().register_forward_hook(blur).remove)
            for key, token in restored.items():
                hook = _putting_back(token, self.kept[key][token])
                stack.callback(self.modules[key].register_forward_hook(hook).remove)
            ids = self.ids.expand(len(self.noise), -1)
            return self._of_answer(model(input_ids=ids, use_cache=False).logits)

    def _of_answer(self, logits: Tensor) -> float:
        return float(logits[:, -1].float().softmax(-1)[:, self.answer].mean())


def _putting_back(token: int, value: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def put(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        hidden = first(output).clone()
        hidden[:, token] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return put


def _module(layout: Layout, kind: str, layer: int) -> nn.Module:
    block = layout.block(layer)
    if kind == "layer":
        return block
    return block.get_submodule("mlp" if kind == "mlp" else _ATTENTION[layout.layers])
