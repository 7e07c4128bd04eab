"""Where the edited maps lie in the shared state, a flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from potluck.edit.contexts import Site
from potluck.edit.layout import Layout
from potluck.errors import EditError
from potluck.models.flat import Entry


@dataclass(frozen=True)
class Map:
    """One layer's map in the flat vector.

    Attributes:
        turned: The model stores the transpose (GPT-2).
    """

    offset: int
    d_out: int
    d_in: int
    turned: bool

    def of(self, theta: Tensor) -> Tensor:
        """``W``, ``(d_out, d_in)``: a view, writing to it writes the vector."""
        stored = (self.d_in, self.d_out) if self.turned else (self.d_out, self.d_in)
        view = theta[self.offset : self.offset + self.d_out * self.d_in].view(stored)
        return view.T if self.turned else view


Maps = Mapping[int, Map]


def maps_of(layout: Layout, manifest: Iterable[Entry], layers: Sequence[int], at: Site = "subject") -> dict[int, Map]:
    """The maps of these layers, by layer, ascending.

    Raises:
        EditError: A layer is not there, is no part of the shared state, or is the last: what that gives at the subject
            reaches no later token, and so no answer.
    """
    entries = {entry.name: entry for entry in manifest}
    if at == "subject" and layout.count - 1 in layers:
        hint = f"edit layers below {layout.count - 1}: what the last gives at a subject reaches no answer"
        raise EditError(f"layer {layout.count - 1} is the model's last", hint)
    found = {}
    for layer in layout.check_layers(layers):
        entry = entries.get(f"{layout.path(layer)}.weight")
        if entry is None:
            hint = "edit layers that are trained; what is frozen stays as it is at everybody"
            raise EditError(f"layer {layer}: {layout.path(layer)} is no part of what is trained together", hint)
        turned = layout.weight(layer).stride(1) != 1
        found[layer] = Map(entry.offset, layout.d_out, layout.d_in, turned)
    return found
