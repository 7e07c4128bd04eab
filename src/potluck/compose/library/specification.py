"""What an entry says of the text it was trained on: a few made-up points that stand for it, and no text.

A reduced kernel mean embedding (RKME; Zhou and Tan, "Learnware", arXiv 2210.03647; Wu et al., "Model reuse with
reduced kernel mean embedding specification", arXiv 2001.07135): with ``k(x, y) = exp(−γ ‖x − y‖²)``, the text's mean
embedding ``μ = mean_x k(x, ·)`` is stood for by ``Σ_j β_j k(z_j, ·)``, where ``β ≥ 0`` and ``Σβ = 1``. The x are states
of the text under the frozen base, as a `Yardstick` reads them.

The points are means of many windows and moved from there. That hides, and proves nothing: noise hides more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from potluck.compose.library.simplex import nearest_mixture
from potluck.compose.library.tensors import packed, unpacked
from potluck.compose.library.yardstick import Yardstick
from potluck.errors import CorpusError, ModelError

MAX_BYTES = 30_000
POINTS = 100
_KMEANS_ROUNDS = 25
_ROUNDS = 3  # of moving the points and weighing them anew
_HALVINGS = 6


@dataclass(frozen=True)
class Specification:
    """Weighted points in the space that a yardstick spans.

    Attributes:
        points: z, ``(K, d)``, fp32.
        weights: β, ``(K,)``, not negative, of sum one.
        yardstick: Hash of the yardstick it was taken with; others measure something else.
        noise: Standard deviation of what was added to each coordinate of z; a state has length one.
    """

    points: Tensor
    weights: Tensor
    yardstick: str
    noise: float = 0.0

    def to_bytes(self) -> bytes:
        """A safetensors content, the points in fp16."""
        facts = {"version": 1, "yardstick": self.yardstick, "noise": self.noise}
        return packed({"points": self.points.half(), "weights": self.weights.float()}, facts)


def read_specification(content: bytes, what: str, yardstick: Yardstick) -> Specification:
    """What `Specification.to_bytes` gave.

    Raises:
        ModelError: It is damaged or too large, or was taken with another yardstick.
    """
    if len(content) > MAX_BYTES:
        raise ModelError(f"{what}: a specification of {len(content)} bytes; {MAX_BYTES} are allowed")
    tensors, facts = unpacked(content, what)
    try:
        points, weights, noise = tensors["points"], tensors["weights"], float(facts["noise"])
        dimension = len(yardstick.directions)
        if facts["version"] != 1 or points.shape != (len(weights), dimension) or weights.ndim != 1 or not len(weights):
            raise ValueError("of another form")
        if (weights < 0).any() or abs(float(weights.sum()) - 1) > 1e-3 or not noise >= 0:
            raise ValueError("its weights are no shares")
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(f"{what}: not a specification ({error})") from None
    if facts["yardstick"] != yardstick.content_hash:
        raise ModelError(f"{what}: taken with the yardstick of another library", "take it again, for this one")
    return Specification(points, weights, yardstick.content_hash, noise)


def kernel(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """``exp(−γ ‖x_i − y_j‖²)``, shape ``(n, m)`` of ``(n, d)`` and ``(m, d)``."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp_min_(0).mul_(-gamma).exp_()


def specification_of(
    states: Tensor, yardstick: Yardstick, *, points: int = POINTS, noise: float = 0.0, seed: int = 0
) -> Specification:
    """The specification of a text's states: k-means, then β and z in turn.

    ``β = argmin ‖Σ β_j k(z_j, ·) − μ‖²`` over the simplex (`nearest_mixture`), and each z goes some way towards where
    the same norm is least with the others held. There are at most two thirds as many points as states, so that none
    stands for a single window.

    Args:
        states: ``(n, d)``, from `Yardstick.measure`.
        points: K, at most.
        noise: As in `Specification`. It is drawn from the system's own randomness: noise from a seed that others can
            guess could be taken off again.
        seed: Decides where k-means begins.

    Raises:
        CorpusError: There are too few states.
    """
    count = min(points, 2 * len(states) // 3)
    if count < 1:
        raise CorpusError(f"a specification needs at least 2 windows of text, this has {len(states)}", "give more text")
    gamma = yardstick.gamma
    z = kmeans(states, count, seed)
    for _ in range(_ROUNDS):
        z = _moved(z, _weighed(z, states, gamma), states, gamma)
    if noise:
        secret = torch.Generator()
        secret.seed()
        z = z + noise * torch.randn(z.shape, generator=secret)
    z = z.half().float()  # as it is stored: the weights are those of what is read again
    weights = _weighed(z, states, gamma)
    kept = weights > 0
    return Specification(z[kept], weights[kept], yardstick.content_hash, noise)


def kmeans(states: Tensor, count: int, seed: int) -> Tensor:
    """Means of so many groups of states, begun by k-means++ (Arthur and Vassilvitskii, 2007), ``(count, d)``.

    In the states' own space: there are many of them and their dimension is small.
    """
    draw = torch.Generator().manual_seed(seed)
    means = states[torch.randint(len(states), (1,), generator=draw)]
    while len(means) < count:
        gaps = torch.cdist(states, means).amin(1).square().clamp_min(1e-12)
        means = torch.cat([means, states[torch.multinomial(gaps, 1, generator=draw)]])
    for _ in range(_KMEANS_ROUNDS):
        nearest = torch.cdist(states, means).argmin(1)
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(means).index_add_(0, nearest, states)
        new = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), means)
        if torch.equal(new, means):
            break
        means = new
    return means


def _weighed(z: Tensor, states: Tensor, gamma: float) -> Tensor:
    """β for given points, of sum one in fp32."""
    z, states = z.double(), states.double()
    weights = nearest_mixture(kernel(z, z, gamma), kernel(z, states, gamma).mean(1)).float()
    return weights / weights.sum()


def _moved(z: Tensor, weights: Tensor, states: Tensor, gamma: float) -> Tensor:
    """Points one step down ``βᵀ K β − 2 cᵀ β``, as far as it falls.

    The gradient by z_j is ``4γ β_j (mean_x k(z_j, x) (z_j − x) − Σ_l β_l k(z_j, z_l) (z_j − z_l))``; it is taken per
    unit of ``4γ β_j c_j``, so that a whole step without the second term would be one of mean shift.
    """
    to_states, to_points = kernel(z, states, gamma) / len(states), kernel(z, z, gamma) * weights
    c = to_states.sum(1, keepdim=True)
    pull = c * z - to_states @ states
    push = to_points.sum(1, keepdim=True) * z - to_points @ z
    step = (pull - push) / c.clamp_min(1e-12)
    before = _misfit(z, weights, states, gamma)
    for halving in range(_HALVINGS):
        moved = z - 0.5**halving * step
        if _misfit(moved, weights, states, gamma) < before:
            return moved
    return z


def _misfit(z: Tensor, weights: Tensor, states: Tensor, gamma: float) -> float:
    """``‖Σβ_j k(z_j, ·) − μ‖²`` without ``‖μ‖²``, which no choice of z changes."""
    w = weights.double()
    own = w @ kernel(z, z, gamma).double() @ w
    return float(own - 2 * (w @ kernel(z, states, gamma).double().mean(1)))
