"""A mixture as `FlexOlmoForCausalLM`, the class that `transformers` and vLLM know, where the shapes allow it.

That is: a base built like Olmo 2, and experts of full size. Its router differs from `TokenRouter`: in every layer a row
for the anchor and for each expert, applied to each token's hidden state by itself, without any bias (transformers has
none; allenai/FlexOlmo issue 32), so that there is no room for what the text so far has said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from potluck.compose.base import Base
from potluck.compose.experts.assembly import check_together, place_of
from potluck.compose.experts.parts import Expert
from potluck.compose.experts.training import each_input
from potluck.compose.training import Lesson
from potluck.errors import ModelError

_RIDGE = 0.01  # of the mean second moment
_OF_ITS_OWN = frozenset({"model_type", "architectures", "_name_or_path", "transformers_version"})


def exported(
    base: Base, experts: Sequence[Expert], public: np.ndarray, lesson: Lesson, experts_per_token: int = 4
) -> FlexOlmoForCausalLM:
    """The mixture of these experts, the anchor being expert 0 and competing with the others.

    Args:
        public: Token ids that the anchor's row stands for.
        lesson: How long the sequences are, and where to compute.
        experts_per_token: As many experts, and the anchor; so one more in FlexOlmo's own count.

    Raises:
        ModelError: The base is of another architecture, an expert is not of full size, or they do not go together.
    """
    check_together(base, experts)
    kind = base.model.config.model_type
    if kind != "olmo2":
        hint = "leave out --as: potluck's own class takes any base with gated feed-forward networks"
        raise ModelError(f"{base.place}: FlexOlmo is built on Olmo 2, and this is a {kind}", hint)
    low = next((expert.name for expert in experts if expert.kind != "full"), None)
    if low is not None:
        hint = "leave out --as, or train it with --as full"
        raise ModelError(f"expert {low}: FlexOlmo has experts of full size only", hint)
    model = FlexOlmoForCausalLM(_config(base, len(experts), experts_per_token))
    model.generation_config = base.model.generation_config
    model.load_state_dict(_state(base, experts, public, lesson))
    model.train(False)
    return model


def domain_rows(embeddings: Tensor, public_mean: Tensor, public_moment: Tensor) -> Tensor:
    """A layer's router: the density ratio of each domain to public text, less 1, as a linear function of the state.

    ``r_i = (M + ρI)⁻¹ (μ_i − μ_0)`` with ``M = E_public[x xᵀ]`` minimises ``E_public[(r·x − (p_i(x)/p_0(x) − 1))²]``
    without knowing either density (unconstrained least-squares importance fitting, Kanamori et al., JMLR 10, 2009);
    near 0 that is the log-ratio, which a softmax wants. The anchor's row is zero.

    Args:
        embeddings: μ_i of each expert, ``(experts, d)``.
        public_mean: μ_0, ``(d,)``.
        public_moment: M, ``(d, d)``.

    Returns:
        Shape ``(1 + experts, d)``, fp32.
    """
    moment = public_moment.double()
    ridge = _RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    rows = torch.cholesky_solve((embeddings - public_mean).double().T, torch.linalg.cholesky(moment + ridge)).T
    return torch.cat([torch.zeros_like(rows[:1]), rows]).float()


def without(model: FlexOlmoForCausalLM, name: str, names: Sequence[str], experts_per_token: int) -> FlexOlmoForCausalLM:
    """The mixture as if this expert had never been in it.

    Args:
        names: Of the experts, in their order; the anchor has none.
        experts_per_token: As it was asked for, when there were more.

    Raises:
        ModelError: There is no such expert, or no other.
    """
    gone = 1 + place_of(names, name)
    kept = torch.tensor([place for place in range(1 + len(names)) if place != gone])
    of_experts = (".mlp.gate.weight", ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
    state = {n: t[kept] if n.endswith(of_experts) else t for n, t in model.state_dict().items()}
    counts = {"num_experts": len(kept), "num_experts_per_tok": min(1 + experts_per_token, len(kept))}
    left = FlexOlmoForCausalLM(FlexOlmoConfig(**{**model.config.to_dict(), **counts}))
    left.generation_config = model.generation_config
    left.load_state_dict(state)
    left.train(False)
    return left


def _config(base: Base, experts: int, experts_per_token: int) -> FlexOlmoConfig:
    shared = {key: value for key, value in base.model.config.to_dict().items() if key not in _OF_ITS_OWN}
    config = FlexOlmoConfig(
        **shared,
        num_experts=1 + experts,
        num_experts_per_tok=min(1 + experts_per_token, 1 + experts),
        norm_topk_prob=True,  # gates of those chosen sum to one
    )
    config._attn_implementation = base.model.config._attn_implementation
    return config


def _state(base: Base, experts: Sequence[Expert], public: np.ndarray, lesson: Lesson) -> dict[str, Tensor]:
    """Olmo 2's parameters, which FlexOlmo calls the same, but for the feed-forward networks."""
    moments = _moments(base, public, lesson)
    base_state = base.model.cpu().state_dict()
    state = {name: tensor for name, tensor in base_state.items() if ".mlp." not in name}
    for number, (mean, moment) in enumerate(moments):
        place = f"model.layers.{number}.mlp"
        anchor = [base_state[f"{place}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
        prefix = f"layers.{number}"
        everyone = [anchor] + [
            [expert.weights[f"{prefix}.{name}.weight"] for name in ("gate_proj", "up_proj", "down_proj")]
            for expert in experts
        ]
        state[f"{place}.experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in everyone])
        state[f"{place}.experts.down_proj"] = torch.stack([down for _, _, down in everyone])
        embeddings = torch.stack([expert.embedding[number] for expert in experts])
        state[f"{place}.gate.weight"] = domain_rows(embeddings, mean, moment)
    return state


def _moments(base: Base, public: np.ndarray, lesson: Lesson) -> list[tuple[Tensor, Tensor]]:
    """Mean and second moment of each layer's inputs over the public text, float64 ``(d,)`` and ``(d, d)``."""
    width, layers = base.model.config.hidden_size, base.model.config.num_hidden_layers
    sums = [(torch.zeros(width).double(), torch.zeros(width, width).double()) for _ in range(layers)]

    def add(number: int, inputs: Tensor) -> None:
        exact = inputs.double().cpu()
        sums[number][0].add_(exact.sum(0))
        sums[number][1].addmm_(exact.T, exact)

    count = each_input(base.model, public, lesson, add)
    return [(total / count, products / count) for total, products in sums]
