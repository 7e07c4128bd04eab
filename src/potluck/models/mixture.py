"""A public base and several participants' experts as one model: a class of `transformers`.

In every layer stands the base's own feed-forward network, the anchor, and beside it an expert of each participant.
What the text so far says about whose text it is decides how much each of them counts::

    y = g_0 FFN_anchor(x) + Σ_e g_e FFN_e(x)        g from `TokenRouter`, Σ g = 1

(FlexOlmo, arXiv 2507.07024; experts of low rank, FlexMoRE, arXiv 2602.08818.) An expert is a feed-forward network of
the anchor's size, or the anchor with additions of low rank inside; both kinds, and any ranks, go together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from potluck.errors import ModelError

MAPS = ("gate_proj", "up_proj", "down_proj")
SCALE = 2.0  # of an addition of low rank: α = 2 r, as adapters are trained
_MOST_EXPERTS = 256
_OF_A_FOLDER = ("_name_or_path", "architectures", "transformers_version")  # said of the base's, not of the base
Kind = Literal["full", "low-rank"]


class MixtureConfig(PreTrainedConfig):
    """The base's configuration and who is there.

    Attributes:
        text_config: Of the base.
        experts: ``name``, ``kind`` (``full`` or ``low-rank``) and ``rank`` (0 if full) of each.
        experts_per_token: As many at most, beside the anchor.
        end_of_text: The token that begins a document, where what was read before is forgotten.
    """

    model_type = "potluck_mixture"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}  # noqa: RUF012
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    experts: list[dict[str, Any]] | None = None
    experts_per_token: int = 4
    end_of_text: int | None = None
    vocab_size: int = 0
    max_position_embeddings: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over what is asked of any language model's configuration."""
        cast(Any, super()).__post_init__(**kwargs)
        base: Any = self.text_config
        self.vocab_size, self.max_position_embeddings = base.vocab_size, base.max_position_embeddings

    @property
    def names(self) -> list[str]:
        """Of the experts."""
        return [str(expert["name"]) for expert in self.experts or []]


class TokenRouter(nn.Module):
    """Whose text it is, by naive Bayes over the document's tokens so far.

    ::

        e_t = n_t^(-1/2) Σ_{s ≤ t} ℓ[x_s] + min(b, 0)        over the n_t tokens since the document began
        g_t = softmax([0, e_t])                              over the anchor and the top k

    ℓ[v] are log-odds of a token in a participant's text against public text, so that the anchor's are zero. The sum
    is divided by √n, not taken whole, since tokens of one document are far from independent.

    Attributes:
        evidence: ℓ, ``(vocabulary, experts)``: a column for each expert.
        bias: b, ``(experts,)``: what an expert must make good before it is chosen.
    """

    def __init__(self, vocabulary: int, experts: int, top_k: int, end_of_text: int | None) -> None:
        super().__init__()
        self.evidence = nn.Parameter(torch.zeros(vocabulary, experts))
        self.bias = nn.Parameter(torch.zeros(experts))
        self.top_k = min(top_k, experts)
        self.end_of_text = end_of_text

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Gates of the anchor and of each expert, ``(batch, length, 1 + experts)``, fp32.

        Args:
            tokens: int64 ``(batch, length)``, from the beginning of the context.
            mask: 0 where a token is padding, ``(batch, length)``.
        """
        present = torch.ones_like(tokens) if mask is None else mask
        said = embedding(tokens, self.evidence).float() * present.unsqueeze(-1)
        read = torch.cat([said, present.unsqueeze(-1).float()], dim=-1)
        sums = _since(self._beginnings(tokens), read)
        evidence = (sums[..., :-1] / sums[..., -1:].clamp(min=1).sqrt()).float()
        logits = evidence + self.bias.float().clamp(max=0)
        chosen = logits.topk(self.top_k, dim=-1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, chosen, logits.gather(-1, chosen))
        return torch.cat([torch.zeros_like(logits[..., :1]), logits], dim=-1).softmax(dim=-1)

    def _beginnings(self, tokens: Tensor) -> Tensor:
        """Where each token's document begins, ``(batch, length)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        begins = tokens == self.end_of_text if self.end_of_text is not None else torch.zeros_like(tokens)
        return (places * begins).cummax(dim=1).values


def _since(beginnings: Tensor, values: Tensor) -> Tensor:
    """Sums of ``(batch, length, n)`` from each place's beginning up to it; fp64, since they are differences of sums."""
    totals = values.double().cumsum(dim=1)
    before = (totals - values.double()).gather(1, beginnings.unsqueeze(-1).expand_as(values))
    return totals - before


class LowRankMap(nn.Module):
    """``x -> SCALE · up (down x)``."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, d_in))
        self.up = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(N, d_in)`` to ``(N, d_out)``."""
        return SCALE * linear(linear(x, self.down), self.up)


class LowRankExpert(nn.Module):
    """Additions to the anchor's three maps."""

    def __init__(self, anchor: Any, rank: int) -> None:
        super().__init__()
        for name in MAPS:
            frozen = getattr(anchor, name)
            self.add_module(name, LowRankMap(frozen.in_features, frozen.out_features, rank))

    @property
    def maps(self) -> list[LowRankMap]:
        """Gate, up and down."""
        return [part for part in self.children() if isinstance(part, LowRankMap)]


@dataclass(frozen=True)
class Division:
    """Who answers for each token: the same in all layers, so it is worked out once.

    Attributes:
        anchor: The anchor's share of each of the N tokens, ``(N, 1)``.
        rows: For each expert, which tokens it is chosen for.
        shares: For each expert, its share of those, ``(len(rows), 1)``.
    """

    anchor: Tensor
    rows: Sequence[Tensor]
    shares: Sequence[Tensor]

    @classmethod
    def by(cls, gates: Tensor) -> Division:
        """Of gates, ``(batch, length, 1 + experts)``."""
        anchor, *experts = gates.flatten(0, -2).split(1, dim=1)
        rows = [share.squeeze(1).nonzero().squeeze(1) for share in experts]
        return cls(anchor, rows, [share[chosen] for share, chosen in zip(experts, rows, strict=True)])


class MixedFeedForward(nn.Module):
    """The anchor and the experts of one layer.

    The anchor's maps are applied once for all experts of low rank: with ``a = W_gate x`` and ``u = W_up x``, expert e
    has ``h_e = act(a + ΔW_gate,e x) ∘ (u + ΔW_up,e x)``, and::

        y = W_down (g_0 h_0 + Σ_e g_e h_e) + Σ_e ΔW_down,e g_e h_e + Σ_{f full} g_f FFN_f(x)

    An expert sees the tokens that it is chosen for and no others.

    Attributes:
        division: Of the tokens at hand; put here before each pass.
    """

    def __init__(self, anchor: Any, experts: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.anchor = anchor
        self.experts = nn.ModuleList(
            copy.deepcopy(anchor) if expert["kind"] == "full" else LowRankExpert(anchor, expert["rank"])
            for expert in experts
        )
        self.division: Division | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, length, d)`` to the same."""
        assert self.division is not None
        anchor: Any = self.anchor
        flat = x.flatten(0, -2)
        gate, up = anchor.gate_proj(flat), anchor.up_proj(flat)
        hidden = self.division.anchor.to(x.dtype) * (anchor.act_fn(gate) * up)
        added = torch.zeros_like(flat, dtype=hidden.dtype)
        for expert, rows, gates in zip(self.experts, self.division.rows, self.division.shares, strict=True):
            if not len(rows):
                continue
            share, seen = gates.to(x.dtype), flat[rows]
            if isinstance(expert, LowRankExpert):
                own: Any = expert
                inner = share * anchor.act_fn(gate[rows] + own.gate_proj(seen)) * (up[rows] + own.up_proj(seen))
                hidden = hidden.index_add(0, rows, inner.to(hidden.dtype))
                outer = own.down_proj(inner)
            else:
                outer = share * expert(seen)
            added = added.index_add(0, rows, outer.to(added.dtype))
        mixed: Tensor = anchor.down_proj(hidden) + added
        return mixed.view(x.shape)


class MixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with an expert of each participant; it generates with the base's key-value cache.

    Attributes:
        network: The base, with a `MixedFeedForward` in the place of each feed-forward network.
        router: One `TokenRouter` for all layers.
    """

    config_class = MixtureConfig
    config: MixtureConfig
    base_model_prefix = "network"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.network = AutoModelForCausalLM.from_config(
            config.text_config, attn_implementation=config._attn_implementation, trust_remote_code=False
        )
        experts = _checked(config, self.network)
        for path, anchor in feed_forwards(self.network).items():
            parent, _, name = path.rpartition(".")
            setattr(self.network.get_submodule(parent), name, MixedFeedForward(anchor, experts))
        self.router = TokenRouter(config.vocab_size, len(experts), config.experts_per_token, config.end_of_text)
        cast(Any, self).post_init()

    @classmethod
    def beside(
        cls,
        base: PreTrainedModel,
        experts: Sequence[Mapping[str, Any]],
        *,
        experts_per_token: int,
        end_of_text: int | None,
        seed: int = 0,
    ) -> MixtureForCausalLM:
        """A copy of a base with experts that change nothing yet: full ones are the anchor, others add zero.

        The ``down`` of low rank are drawn from ``seed`` as PEFT draws them (Kaiming, uniform).

        Raises:
            ModelError: The base is a mixture, or its feed-forward networks are of another kind than gate, up, down.
        """
        if isinstance(base, cls):
            raise ModelError("the base is itself a mixture", "assemble all experts beside the base it was made from")
        config = MixtureConfig(
            text_config={key: value for key, value in base.config.to_dict().items() if key not in _OF_A_FOLDER},
            experts=[dict(expert) for expert in experts],
            experts_per_token=experts_per_token,
            end_of_text=end_of_text,
        )
        config._attn_implementation = base.config._attn_implementation
        model = cls(config)
        model.generation_config = copy.deepcopy(base.generation_config)
        state = {model.place_of(name): tensor for name, tensor in base.state_dict().items()}
        model.load_state_dict(state, strict=False)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.layers:
                for expert in layer.experts:
                    if not isinstance(expert, LowRankExpert):
                        expert.load_state_dict(layer.anchor.state_dict())
                        continue
                    for part in expert.maps:
                        bound = 1 / math.sqrt(part.down.shape[1])
                        part.down.copy_((2 * torch.rand(part.down.shape, generator=draw) - 1) * bound)
        model.train(False)
        return model

    @property
    def layers(self) -> list[MixedFeedForward]:
        """The mixed feed-forward networks, from the first layer to the last."""
        return [module for module in self.network.modules() if isinstance(module, MixedFeedForward)]

    def place_of(self, name: str) -> str:
        """Where a parameter of the base is in this model."""
        for path, module in self.network.named_modules():
            if isinstance(module, MixedFeedForward) and name.startswith(f"{path}."):
                return f"network.{path}.anchor.{name.removeprefix(f'{path}.')}"
        return f"network.{name}"

    def expert_parameters(self) -> list[nn.Parameter]:
        """What learns in isolation: the experts, not the router."""
        return [parameter for layer in self.layers for parameter in layer.experts.parameters()]

    def learning(self) -> list[nn.Parameter]:
        """What learns jointly: experts and router, not the base."""
        return [*self.expert_parameters(), *self.router.parameters()]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        gates: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """As the base's.

        Args:
            input_ids: int64 ``(batch, length)``; embeddings will not do, for the router goes by tokens.
            attention_mask: 0 where a token is padding.
            past_key_values: Of the tokens before these, if they are not given again.
            gates: Of these tokens, ``(batch, length, 1 + experts)``; must be given if there are such tokens.
            others: What the base's takes, such as ``labels``.
        """
        if gates is None:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise ValueError("the tokens go on from others: give the gates that the router finds with those")
            flat_mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            gates = self.router(input_ids, flat_mask)
        layers, division = self.layers, Division.by(gates)
        for layer in layers:
            layer.division = division
        try:
            given = {"attention_mask": attention_mask, "past_key_values": past_key_values, **others}
            output: CausalLMOutputWithPast = self.network(input_ids=input_ids, **given)
        finally:
            for layer in layers:
                layer.division = None
        return output

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base's inputs, and the gates of the tokens at hand, for which the whole text is read."""
        inputs: dict[str, Any] = cast(Any, super()).prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs["gates"] = self.router(input_ids, kwargs.get("attention_mask"))[:, -inputs["input_ids"].shape[1] :]
        return inputs

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        layer: nn.Module = self.network.get_input_embeddings()
        return layer

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        layer: nn.Module = self.network.get_output_embeddings()
        return layer


def feed_forwards(model: nn.Module) -> dict[str, nn.Module]:
    """A model's feed-forward networks of gate, up and down, from the first layer to the last.

    Raises:
        ModelError: There are none, or they have biases.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in MAPS) and hasattr(module, "act_fn")
    }
    kind = type(model).__name__
    if not found:
        hint = "models built like Llama, Qwen3 or Olmo2 do"
        raise ModelError(f"{kind} has no feed-forward networks of gate_proj, up_proj and down_proj", hint)
    if any(getattr(module, name).bias is not None for module in found.values() for name in MAPS):
        raise ModelError(f"{kind}: its feed-forward networks have biases, which experts beside them cannot share")
    return found


def _checked(config: MixtureConfig, network: nn.Module) -> list[dict[str, Any]]:
    """The table of experts, of bounded size."""
    experts = config.experts or []
    anchor: Any = next(iter(feed_forwards(network).values()))
    most = min(anchor.gate_proj.in_features, anchor.gate_proj.out_features)
    if not 1 <= len(experts) <= _MOST_EXPERTS or len(set(config.names)) < len(experts) or config.experts_per_token < 1:
        raise ModelError(
            f"a mixture has 1 to {_MOST_EXPERTS} experts, each with a name of its own, and gives a token 1 or more"
        )
    for expert in experts:
        full, rank = expert.get("kind") == "full", expert.get("rank")
        if not full and (expert.get("kind") != "low-rank" or not isinstance(rank, int) or not 1 <= rank <= most):
            raise ModelError(f"expert {expert.get('name')}: neither full nor of a rank from 1 to {most}")
    return experts
