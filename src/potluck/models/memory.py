"""A model with a side memory of edits: one linear map that answers differently where an edit is asked for.

`Codebook` (GRACE) replaces the map's output at single tokens; `Shards` (WISE) add to it from the token on at which an
edit is recognised, for as many tokens as its answer has. Both decide token by token from what came before, so that a
text gives the same answers alone or in a batch, padded at the right, whole or with a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

_MOST_ENTRIES = 1 << 20


class Codebook(nn.Module):
    """Keys, each with a radius and the output that stands for the map's where an input is that near (arXiv 2211.11031).

    ``y ← v_j`` if ``‖x − k_j‖ ≤ ε_j`` for the nearest key j.
    """

    def __init__(self, entries: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(entries, d_in))
        self.register_buffer("values", torch.zeros(entries, d_out))
        self.register_buffer("radii", torch.zeros(entries))

    def reset(self) -> None:
        """Nothing is carried from token to token."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The map's input ``(B, T, d_in)`` and output ``(B, T, d_out)`` to the output that counts."""
        if not len(self.keys):  # type: ignore[arg-type]
            return y
        keys, values, radii = (cast(Tensor, getattr(self, name)) for name in ("keys", "values", "radii"))
        distance, nearest = torch.cdist(x.float(), keys.float()).min(-1)
        return torch.where((distance <= radii[nearest])[..., None], values[nearest].to(y.dtype), y)


class Shards(nn.Module):
    """Additions to the map's weight, each at work where it is recognised, for one answer (after arXiv 2405.14768).

    ``s_j(t) = max_{t − n_j < u ≤ t} ‖Δ_j x_u‖`` with ``n_j`` the tokens of its longest answer; with j of the largest
    ``s_j / ε_j``, if that is 1 or more, ``y ← y + Δ_j x``. So it is silent again once the answer is given.
    """

    def __init__(self, shards: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.register_buffer("deltas", torch.zeros(shards, d_out, d_in))
        self.register_buffer("thresholds", torch.ones(shards))
        self.register_buffer("spans", torch.ones(shards, dtype=torch.int64))
        self._seen: Tensor | None = None

    def reset(self) -> None:
        """New texts begin."""
        self._seen = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The map's input ``(B, T, d_in)`` and output ``(B, T, d_out)`` to the output that counts."""
        deltas, thresholds, spans = (cast(Tensor, getattr(self, n)) for n in ("deltas", "thresholds", "spans"))
        if not len(deltas):
            return y
        added = torch.stack([linear(x, delta.to(x.dtype)) for delta in deltas], dim=-1)  # (B, T, d_out, S)
        ratio = added.float().norm(dim=-2) / thresholds
        longest = int(spans.max())
        seen = self._seen
        if seen is None or len(seen) != len(ratio):
            seen = ratio.new_zeros(len(ratio), longest - 1, len(deltas))
        ratio = torch.cat([seen, ratio], dim=1)
        self._seen = ratio[:, ratio.shape[1] - (longest - 1) :].detach()
        ago = torch.arange(longest - 1, -1, -1, device=ratio.device)
        held = ratio.unfold(1, longest, 1).masked_fill(ago >= spans[:, None], 0).amax(-1)  # (B, T, S)
        best, which = held.max(-1)
        chosen = added.gather(-1, which[..., None, None].expand(*added.shape[:-1], 1)).squeeze(-1)
        return torch.where((best >= 1)[..., None], y + chosen, y)


Memory = Codebook | Shards


def install(model: PreTrainedModel, path: str, memory: Memory) -> Callable[[], None]:
    """Let the model's map at a path have a memory, until what is returned is called.

    What the memory carries from token to token ends where a text begins: where there is no cache yet.
    """

    def remember(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        remembered: Tensor = memory(inputs[0], output)
        return remembered

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            memory.reset()

    hooks = ExitStack()
    hooks.callback(model.get_submodule(path).register_forward_hook(remember).remove)
    hooks.callback(model.base_model.register_forward_pre_hook(begin, with_kwargs=True).remove)
    return hooks.close


class EditedConfig(PreTrainedConfig):
    """A model and the memory beside it.

    Attributes:
        base: The model's own configuration.
        path: Of the map that has the memory.
        kind: ``codebook`` or ``shards``.
        entries: Of the codebook, or shards.
        d_in, d_out: Of the map.
    """

    model_type = "potluck_edited"
    base: dict[str, Any] | None = None
    path: str = ""
    kind: str = "codebook"
    entries: int = 0
    d_in: int = 0
    d_out: int = 0
    vocab_size: int = 0
    hidden_size: int = 0
    max_position_embeddings: int = 0
    num_hidden_layers: int = 0


class EditedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with a side memory; of a class of its own, so that nobody loads it without the edits."""

    config_class = EditedConfig
    config: EditedConfig
    supports_gradient_checkpointing = False
    _supports_sdpa = True

    def __init__(self, config: EditedConfig) -> None:
        super().__init__(config)
        table = {key: value for key, value in (config.base or {}).items() if key not in ("dtype", "torch_dtype")}
        base = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**table), attn_implementation="sdpa", trust_remote_code=False
        )
        self.edited = cast(PreTrainedModel, base)
        kinds: dict[str, type[Memory]] = {"codebook": Codebook, "shards": Shards}
        if config.kind not in kinds or not 0 <= config.entries <= _MOST_ENTRIES:
            raise ValueError(f"a memory of kind {config.kind!r} with {config.entries} entries is not known")
        self.memory = kinds[config.kind](config.entries, config.d_in, config.d_out)
        cast(Any, self).post_init()
        self.detach = install(self.edited, config.path, self.memory)  # leaves ``edited`` as it was

    def get_input_embeddings(self) -> nn.Module:
        """The model's."""
        return self.edited.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The model's."""
        return cast(nn.Module, self.edited.get_output_embeddings())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model itself."""
        return self.edited(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: all weights come from the folder."""
