"""The way down: what must travel so that a participant holds the shared state, bit for bit.

The mode is the recipe's ``updates.download``. In ``full`` the parameters that changed travel as they are. In ``delta``
and ``quantized`` each outer step travels as a message about the fragment it changed, and what that message says is the
truth: the coordinator, too, puts ``theta_p <- theta_p + decode(message)``. What quantisation loses stays with the
coordinator and goes into the next message about that fragment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from potluck.errors import TrainingError
from potluck.recipe.updates import (
    Download,
    ErrorFeedback,
    FullDownload,
    Quantize,
    QuantizedDownload,
)
from potluck.updates.fragments import Fragment
from potluck.updates.links import Link, State, link_of, pack, unpack
from potluck.updates.sizes import packed

WHOLE = "parameters"
Tensors = dict[str, Tensor]


class Downloads:
    """The coordinator's side: who holds which revision, and the messages since.

    Attributes:
        held: Revision that each participant holds, as far as is known.
        states: For each fragment, what its messages have not said yet (``quantized``).
    """

    def __init__(self, table: Download, fragments: tuple[Fragment, ...]) -> None:
        self._table, self._fragments = table, fragments
        self.held: dict[str, int] = {}
        self.states: list[State] = [
            _link(table).init(f.layout) if isinstance(table, QuantizedDownload) else {} for f in fragments
        ]
        self._messages: dict[int, Tensors] = {}

    def settle(self, theta: Tensor, before: Tensor, revision: int) -> None:
        """Turn the outer step that led to ``revision`` into what participants will be told of it.

        Args:
            theta: The shared state after the step; becomes what the message says.
            before: The fragment's elements before it.
        """
        if isinstance(self._table, FullDownload):
            return
        place = (revision - 1) % len(self._fragments)
        fragment = self._fragments[place]
        step = fragment.take(theta) - before
        if isinstance(self._table, QuantizedDownload):
            message = pack(_link(self._table), step, fragment.layout, self.states[place], 0)
        else:
            message = _exact(step)
        fragment.put(theta, before + _step(self._table, message, fragment))
        self._messages[revision] = message
        self._messages.pop(revision - self._table.history, None)

    def tensors(self, name: str, theta: Tensor, revision: int) -> Tensors:
        """What a participant needs to come to ``revision``; afterwards it is taken to hold it."""
        held = self.held.get(name)
        self.held[name] = revision
        if held == revision:
            return {}
        if held is None:
            return {WHOLE: theta}
        if isinstance(self._table, FullDownload):
            return self._changed(theta, held, revision)
        missed = range(held + 1, revision + 1)
        if any(number not in self._messages for number in missed):
            return {WHOLE: theta}
        told = {f"{number}.{part}": t for number in missed for part, t in self._messages[number].items()}
        return told if sum(t.numel() * t.element_size() for t in told.values()) < 4 * theta.numel() else {WHOLE: theta}

    def forget(self, name: str) -> None:
        """A participant may not hold what it was sent: send it everything next time."""
        self.held.pop(name, None)

    def _changed(self, theta: Tensor, held: int, revision: int) -> Tensors:
        count = len(self._fragments)
        if revision - held >= count:
            return {WHOLE: theta}
        changed = {(number - 1) % count for number in range(held + 1, revision + 1)}
        return {f"fragment-{place}": self._fragments[place].take(theta) for place in sorted(changed)}


def absorb(
    table: Download, fragments: tuple[Fragment, ...], tensors: Mapping[str, Tensor], shared: Tensor | None
) -> Tensor:
    """The participant's side: the shared state after a download.

    Args:
        tensors: What came with a task; nothing, if the participant holds the revision.
        shared: What it held; changed in place where only differences came.

    Returns:
        The shared state, fp32 ``(N,)``. Where nothing but whole states travel it is what came, not a copy.

    Raises:
        TrainingError: The participant holds nothing yet, or what came does not fit.
    """
    size = sum(fragment.size for fragment in fragments)
    if WHOLE in tensors:
        whole = tensors[WHOLE]
        if whole.shape != (size,) or whole.dtype != torch.float32:
            raise TrainingError(f"a shared state of {whole.dtype} {tuple(whole.shape)} does not fit the model")
        return whole if isinstance(table, FullDownload) and len(fragments) == 1 else whole.clone()
    if shared is None:
        raise TrainingError("no shared state has come yet")
    if isinstance(table, FullDownload):
        for place, elements in _whole_fragments(fragments, tensors).items():
            fragments[place].put(shared, elements)
        return shared
    for number, message in _by_revision(tensors):
        fragment = fragments[(number - 1) % len(fragments)]  # they take turns
        fragment.put(shared, fragment.take(shared) + _step(table, message, fragment))
    return shared


def _whole_fragments(fragments: tuple[Fragment, ...], tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The parameters of fragments that came, by place."""
    names = {f"fragment-{place}": place for place in range(len(fragments))}
    for name, elements in tensors.items():
        if name not in names or elements.dtype != torch.float32 or elements.shape != (fragments[names[name]].size,):
            raise TrainingError(f"{name!r}, {elements.dtype} {tuple(elements.shape)}, is no fragment of the model")
    return {names[name]: elements for name, elements in tensors.items()}


def _by_revision(tensors: Mapping[str, Tensor]) -> list[tuple[int, Tensors]]:
    """Messages of outer steps, which must follow one another."""
    found: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        number, _, part = name.partition(".")
        if not re.fullmatch(r"[1-9][0-9]{0,8}", number) or part not in _PARTS:
            raise TrainingError(f"{name!r} is no part of an outer step")
        found.setdefault(int(number), {})[part] = tensor
    numbers = sorted(found)
    if numbers and numbers[-1] - numbers[0] != len(numbers) - 1:
        raise TrainingError(f"outer steps {', '.join(map(str, numbers))}: some between them did not come")
    return [(number, found[number]) for number in numbers]


_PARTS = ("bitmap", "values", "codes", "scales")


def _link(table: QuantizedDownload) -> Link:
    return link_of((ErrorFeedback(), Quantize(bits=table.bits, block=table.block)))


def _exact(step: Tensor) -> Tensors:
    """A step without its zeros: a bit for each element and the others' values; all of it where that is shorter."""
    changed = step != 0
    values = step[changed]
    if packed(step.numel(), 1) + 4 * values.numel() >= 4 * step.numel():
        return {"values": step}
    return {"bitmap": torch.from_numpy(np.packbits(changed.numpy())), "values": values}


def _step(table: Download, message: Tensors, fragment: Fragment) -> Tensor:
    if isinstance(table, QuantizedDownload):
        return unpack(_link(table), message, fragment.layout, 0)
    values, bitmap = message.get("values"), message.get("bitmap")
    if values is None or values.dtype != torch.float32 or values.ndim != 1:
        raise TrainingError("a difference without its values")
    if bitmap is None:
        changed = torch.ones(fragment.size, dtype=torch.bool)
    elif bitmap.dtype != torch.uint8 or bitmap.shape != (packed(fragment.size, 1),):
        raise TrainingError("a difference whose places are not those of the model")
    else:
        changed = torch.from_numpy(np.unpackbits(bitmap.numpy(), count=fragment.size)).bool()
    if int(changed.sum()) != values.numel():
        raise TrainingError("a difference whose places do not match its values")
    step = torch.zeros(fragment.size)
    step[changed] = values
    return step
