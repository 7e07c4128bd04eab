"""The inner optimizer: PyTorch's own, with all its moments in one flat vector."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from potluck.errors import RecipeError
from potluck.models.flat import FlatParameters
from potluck.recipe.local import AdamW, LocalOptimizer, LocalSgd, Muon

_Group = dict[str, object]
_ROUTER = re.compile(r"(^|[._])(gate|router)$")  # Mixtral's, Qwen's and Jamba's names; a gated MLP has `gate_proj`


class InnerOptimizer:
    """AdamW, Muon with AdamW, or SGD over the model's parameters.

    Its moments are views of one flat vector. On the CPU that vector belongs to a participant, and ``bind`` swaps
    participants by pointing at another; on a GPU it is a buffer, and moments are copied in and out of host memory.
    A checkpoint of a participant's vector and step count is complete.

    Args:
        table: The recipe's ``local.optimizer``.
        flat: The parameters.
        model: What they belong to: it says which of them Muon takes, `hidden_matrices`.

    Raises:
        RecipeError: Muon has nothing to take.
    """

    def __init__(self, table: LocalOptimizer, flat: FlatParameters, model: nn.Module) -> None:
        self._optimizers = _optimizers(table, flat.parameters, model)
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["peak"] = group["lr"]
        self._slots = [(o.state[p], slot, p) for o in self._optimizers for slot in _slots(o) for p in _parameters(o)]
        self._sizes = [p.numel() for _, _, p in self._slots]
        self.size = sum(self._sizes)
        counted = [o.state[p] for o in self._optimizers if isinstance(o, torch.optim.AdamW) for p in _parameters(o)]
        self._counts = torch.zeros(len(counted), device=flat.vector.device)  # AdamW keeps one for each parameter
        for state, count in zip(counted, self._counts.unbind(), strict=True):
            state["step"] = count
        self.steps = 0
        device = flat.vector.device
        self._buffer = None if device.type == "cpu" else torch.empty(self.size, device=device)

    def bind(self, moments: Tensor, steps: int) -> None:
        """Continue from a participant's moments.

        Args:
            moments: fp32 ``(size,)`` in host memory; steps write into it, on a GPU at ``release``.
            steps: Optimizer steps behind them (AdamW's bias correction).
        """
        self.steps = steps
        self._counts.fill_(steps)
        vector = moments if self._buffer is None else self._buffer.copy_(moments)
        for (state, slot, parameter), view in zip(self._slots, vector.split(self._sizes), strict=True):
            state[slot] = view.view_as(parameter)

    def release(self, moments: Tensor) -> None:
        """Write what the steps since ``bind`` have made of the moments back to where they came from."""
        if self._buffer is not None:
            moments.copy_(self._buffer)

    def step(self, rate: float) -> None:
        """One step at ``rate`` times the peak learning rate."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
        self.steps += 1


def hidden_matrices(model: nn.Module) -> dict[int, bool]:
    """The matrices that Muon is made for: weights of linear maps from hidden features to hidden features.

    Not embeddings of any kind (tokens, positions, token types), not the head, tied or not, not routers and gates, whose
    rows are scores of experts, and nothing that is no linear layer's weight, as low-rank factors and tables.

    Returns:
        From a parameter's ``id`` to whether it is stored the other way round, ``(in, out)`` as GPT-2's are.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    others = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    others |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return {
        id(module.weight): isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _ROUTER.search(name) and id(module.weight) not in others
    }


def _optimizers(
    table: LocalOptimizer, parameters: Sequence[nn.Parameter], model: nn.Module
) -> list[torch.optim.Optimizer]:
    match table:
        case AdamW():
            return [_adamw(parameters, table.learning_rate, table)]
        case Muon():
            hidden = hidden_matrices(model)
            matrices = [p for p in parameters if id(p) in hidden]
            if not matrices:
                raise RecipeError(
                    "local.optimizer muon: none of the parameters that learn is the weight of a hidden linear layer",
                    'use kind = "adamw"',
                )
            muon = torch.optim.Muon(
                _muon_groups(table, matrices, hidden),
                lr=table.learning_rate,
                momentum=table.momentum,
                weight_decay=table.weight_decay,
            )
            return [muon, _adamw([p for p in parameters if id(p) not in hidden], table.adamw_learning_rate, table)]
        case LocalSgd():
            groups = _decay_matrices(parameters, table.weight_decay)
            return [torch.optim.SGD(groups, lr=table.learning_rate, momentum=table.momentum, fused=True)]


def _muon_groups(table: Muon, matrices: Sequence[nn.Parameter], hidden: Mapping[int, bool]) -> list[_Group]:
    """All in one group, but one for each shape stored ``(in, out)``, with the rate of its transpose.

    torch steps by ``rate x sqrt(max(1, rows / columns))``, which means ``out / in``, and decays by ``rate x decay``.
    """
    groups: list[_Group] = [{"params": [p for p in matrices if not hidden[id(p)]]}]
    turned: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in matrices:
        if hidden[id(parameter)]:
            turned.setdefault(tuple(parameter.shape), []).append(parameter)
    for (rows, columns), alike in turned.items():
        factor = math.sqrt(max(1, columns / rows) / max(1, rows / columns))
        scaled: _Group = {"lr": factor * table.learning_rate, "weight_decay": table.weight_decay / factor}
        groups.append({"params": alike, **scaled})
    return [group for group in groups if group["params"]]


def _adamw(parameters: Sequence[nn.Parameter], rate: float, table: AdamW | Muon) -> torch.optim.Optimizer:
    groups = _decay_matrices(parameters, table.weight_decay)
    return torch.optim.AdamW(groups, lr=rate, betas=(table.beta1, table.beta2), eps=table.epsilon, fused=True)


def _decay_matrices(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[_Group]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups: list[_Group] = [{"params": matrices, "weight_decay": weight_decay}]
    return [*groups, {"params": vectors, "weight_decay": 0.0}] if vectors else groups


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _slots(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, torch.optim.AdamW):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
