"""What makes specifications comparable: one way, common to a library, from text to points, and one width of kernel.

A text is cut into windows. A window's state is what the base makes of it: the mean of its token embeddings and the mean
of its last hidden states, each of length one; then centred, projected and brought to length one again. Centre,
directions and the kernel's width come from text that the base itself writes: it is nobody's, and no participant's text
leaves a trace in what all share.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pdist

from potluck.compose.base import Base
from potluck.compose.effect import affordable
from potluck.compose.library.storage import Storage
from potluck.compose.library.tensors import packed, unpacked
from potluck.compose.library.written import Say, written_by
from potluck.compose.training import placed
from potluck.errors import CorpusError, ModelError

MAX_WINDOW = 128  # tokens
MAX_WINDOWS, _LEAST_WINDOWS = 2048, 128  # of a text; more are passed over evenly
_OPERATIONS = 2.5e12  # of reading a text
MAX_DIMENSION = 128
_BATCH = 64
_SHRINKAGE = 0.1


@dataclass(frozen=True)
class Yardstick:
    """From states of a base to points of length one, and how near is near.

    Attributes:
        library: Random id of the library that it belongs to.
        base_hash: The base's `content_hash`.
        centre: Mean state of the base's own text, ``(D,)``.
        directions: ``(d, D)``; see `yardstick_of`.
        gamma: Of the kernel ``exp(−γ ‖x − y‖²)``: one over the median of ``‖x − y‖²`` in the base's own text.
        window: Tokens that a state is of.
    """

    library: str
    base_hash: str
    centre: Tensor
    directions: Tensor
    gamma: float
    window: int = MAX_WINDOW

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what `to_bytes` gives."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def measure(self, base: Base, stream: np.ndarray, device: str = "auto") -> Tensor:
        """A text's windows as points of length one, ``(n, d)`` in fp32 on the CPU.

        Raises:
            ModelError: It is not the base that the library is for.
            CorpusError: The text is shorter than one window.
        """
        if base.content_hash != self.base_hash:
            raise ModelError(f"{base.place}: not the base of this library", "its adapters fit no other weights")
        return self.points(window_states(base, stream, self.window, device))

    def points(self, states: Tensor) -> Tensor:
        """States ``(n, D)`` as points ``(n, d)``."""
        return normalize((states - self.centre) @ self.directions.T, dim=1)

    def to_bytes(self) -> bytes:
        """A safetensors content."""
        names = ("library", "base_hash", "gamma", "window")
        facts = {"version": 1} | {name: getattr(self, name) for name in names}
        return packed({"centre": self.centre, "directions": self.directions}, facts)


def yardstick_of(
    base: Base,
    library: str,
    device: str = "auto",
    seed: int = 0,
    keep: Storage | None = None,
    say: Say = lambda text: None,
) -> Yardstick:
    """The yardstick of a base, from up to 512 windows that it writes (`written_by`).

    The directions are the first 128 principal ones of these windows' states, each divided by the square root of its
    variance plus a tenth of the mean variance: what varies much in any text counts less.

    Args:
        seed: Decides what the base writes.
        keep: Where what is written lies until it is all there.
        say: Told how far it is.

    Raises:
        StorageError: ``keep`` cannot be read or written.
    """
    window = min(MAX_WINDOW, int(getattr(base.model.config, "max_position_embeddings", None) or MAX_WINDOW + 1) - 1)
    states = window_states(base, written_by(base, window, device, seed, keep, say), window, device).double()
    centre = states.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov((states - centre).T))
    variances = variances.clamp_min(0)
    floor = _SHRINKAGE * float(variances.mean()) + 1e-12
    variances, axes = variances.flip(0)[:MAX_DIMENSION], axes.flip(1)[:, :MAX_DIMENSION]
    directions = (axes / (variances + floor).sqrt()).T
    points = normalize((states - centre) @ directions.T, dim=1)
    gamma = 1 / float(pdist(points).square().median().clamp_min(1e-6))
    return Yardstick(library, base.content_hash, centre.float(), directions.float().contiguous(), gamma, window)


def read_yardstick(content: bytes, what: str) -> Yardstick:
    """What `Yardstick.to_bytes` gave.

    Raises:
        ModelError: It is damaged, or of another version.
    """
    tensors, facts = unpacked(content, what)
    try:
        centre, directions = tensors["centre"], tensors["directions"]
        gamma, window = float(facts["gamma"]), int(facts["window"])
        fits = directions.ndim == 2 and centre.shape == directions.shape[1:] and 1 <= len(directions) <= MAX_DIMENSION
        if not fits or facts["version"] != 1 or not 1 <= window <= MAX_WINDOW or not 0 < gamma < float("inf"):
            raise ValueError("of another form")
        return Yardstick(str(facts["library"]), str(facts["base_hash"]), centre, directions, gamma, window)
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{what}: not a library's yardstick ({error})") from None


def window_states(base: Base, stream: np.ndarray, window: int, device: str = "auto") -> Tensor:
    """Mean token embedding and mean last hidden state of each window of tokens, of length one each, ``(n, D)``.

    A window is read by itself, so that its state says nothing of the text before it. Of long texts 2,048 windows are
    read, evenly spaced, or fewer of a large base: what 2.5e12 operations pay for, but 128 at least. The rest at the end
    that fills no window is left out.

    Raises:
        CorpusError: The text is shorter than one window.
    """
    count = len(stream) // window
    if count < 1:
        raise CorpusError(f"the text has {len(stream)} tokens, a window needs {window}", "give more text")
    most = affordable(base.model, window, _OPERATIONS, _LEAST_WINDOWS, MAX_WINDOWS)
    chosen = np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)
    windows = torch.from_numpy(stream[: count * window].reshape(count, window)[chosen])
    network, found = placed(base.model, device), []
    embedding = network.model.get_input_embeddings()
    with torch.no_grad(), network.precision():
        for batch in windows.to(network.device).split(_BATCH):
            hidden = network.model.base_model(input_ids=batch, use_cache=False).last_hidden_state
            means = [states.float().mean(1) for states in (embedding(batch), hidden)]
            found.append(torch.cat([normalize(mean, dim=1) for mean in means], dim=1).cpu())
    return torch.cat(found)
