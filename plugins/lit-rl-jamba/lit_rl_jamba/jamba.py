"""The trunk `jamba`: Mamba and attention layers in any order (Lieber et al. 2024, arXiv:2403.19887).

    u   = embedding(x)
    u  <- u + mixer_l(norm_l(u))                a Mamba or an attention layer, as `pattern` says
    u  <- u + feedforward_l(norm_ff_l(u))       a SwiGLU, or a mixture of experts    for l = 0 .. L-1
    y   = norm_f(u)

RMSNorm before each (the released Jamba has more of them inside Mamba), and no positional encoding: the Mamba
layers know the order of steps.

Shapes: B rows, T time steps, F input features, D = d_model, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from lit_rl_ssm.blocks import require_sizes, resets_by
from lit_rl_ssm.mamba import MambaMixer
from lit_rl_ssm.mamba2 import Mamba2Mixer
from lit_rl_ssm.norm import RMSNorm
from lit_rl_transformers.attention import WindowAttention
from tensordict import TensorDict
from torch import Tensor, nn

from lit_rl.trunks import Linear, Trunk
from lit_rl_jamba.experts import Experts, Load, SwiGLU
from lit_rl_jamba.pattern import ATTENTION, MAMBA, expert_layers, spell_layers

Memory = dict[str, Tensor]  # one layer's state, [B, ...] each


class Block(nn.Module):
    """``u + mixer(norm(u))``, then ``u + feedforward(norm_ff(u))``."""

    def __init__(self, mixer: nn.Module, feedforward: SwiGLU | Experts) -> None:
        super().__init__()
        self.norm = RMSNorm(mixer.d_model)
        self.mixer = mixer
        self.norm_ff = RMSNorm(mixer.d_model)
        self.feedforward = feedforward

    def forward(
        self, u_BTD: Tensor, memory: Memory, is_init_BT: Tensor
    ) -> tuple[Tensor, Memory, Load | None]:
        y_BTD, memory = self.mixer(self.norm(u_BTD), memory, is_init_BT)
        u_BTD = u_BTD + y_BTD
        y_BTD, load = self.feedforward(self.norm_ff(u_BTD))
        return u_BTD + y_BTD, memory, load


class Jamba(Trunk):
    """Layers of two kinds in a pre-norm residual stack, with experts on some of them.

    Args:
        in_features: F.
        d_model: width of the stack.
        pattern: one block of layers, as a ratio Mamba:attention (``"3:1"``, in YAML with the quotes) or
            spelled in order with the letters m and a (``mmam``, the same); see `lit_rl_jamba.pattern`.
        n_layers: how many, in whole blocks; one block if absent.
        mamba: which Mamba the letter m stands for.
        d_state: memory of a Mamba channel (of a head in Mamba-2); 16, in Mamba-2 64, if absent.
        d_conv: taps of Mamba's convolution.
        expand: inner width of Mamba over d_model.
        headdim: channels of a head of Mamba-2; Mamba has none.
        n_heads: heads of attention.
        memory: past steps that attention sees.
        d_ff: width of a SwiGLU, and of each expert; 2 d_model if absent.
        experts: how many in a mixture; 0 for none.
        top_k: experts that a token gets.
        moe_every: a mixture on the last of each so many layers: 2 is layers 1, 3, 5, ...
        moe_layers: the layers with a mixture by number, from 0, instead of `moe_every`; needs `experts`.
        balance_coef: weight of the load-balance loss, summed over layers, in `auxiliary_loss`.
        reset: "leaky" ignores `is_init`, a common mistake kept as an option, for comparison.
        backend: how Mamba layers compute, see `lit_rl_ssm.mamba`.

    State: the entries of each kind of layer, stacked over its layers: ``mamba_...`` (or ``mamba2_...``)
    ``[B, n_mamba, ...]`` and ``attention_...`` ``[B, n_attention, ...]``.

    In training, a pass with gradients through experts sets `auxiliary_loss` and `metrics`: each expert's
    share of a layer's assignments, ``expert_usage/layer1_expert0`` and so on, which sum to 1 over a layer.
    Any other pass sets `auxiliary_loss` to None and leaves `metrics` as they are. Copies begin with None.
    """

    def __init__(
        self,
        in_features: int,
        *,
        d_model: int = 128,
        pattern: str | int = "3:1",  # int: what YAML makes of an unquoted ratio, refused with a reason
        n_layers: int | None = None,
        mamba: Literal["mamba", "mamba2"] = "mamba",
        d_state: int | None = None,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 32,
        n_heads: int = 4,
        memory: int = 64,
        d_ff: int | None = None,
        experts: int = 0,
        top_k: int = 2,
        moe_every: int = 2,
        moe_layers: list[int] | None = None,
        balance_coef: float = 0.01,
        reset: Literal["strict", "leaky"] = "strict",
        backend: Literal["auto", "torch", "cuda"] = "auto",
    ) -> None:
        d_ff = 2 * d_model if d_ff is None else d_ff
        require_sizes(in_features=in_features, d_model=d_model, d_ff=d_ff, moe_every=moe_every)
        for name, number in (("experts", experts), ("balance_coef", balance_coef)):
            if not number >= 0:
                raise ValueError(f"{name} must be at least 0, not {number}")
        if mamba not in ("mamba", "mamba2"):
            raise ValueError(f"mamba must be one of mamba, mamba2, not {mamba!r}")
        if moe_layers is not None and not experts:
            raise ValueError(
                f"moe_layers is {moe_layers} but experts is 0: give the number of experts, or leave it out"
            )
        resets = resets_by(reset)
        letters = spell_layers(pattern, n_layers)
        super().__init__(in_features, out_features=d_model)

        mambas: dict[str, Callable[[], nn.Module]] = {
            "mamba": lambda: MambaMixer(
                d_model,
                d_state=16 if d_state is None else d_state,
                d_conv=d_conv,
                expand=expand,
                backend=backend,
            ),
            "mamba2": lambda: Mamba2Mixer(
                d_model,
                d_state=64 if d_state is None else d_state,
                d_conv=d_conv,
                expand=expand,
                headdim=headdim,
                backend=backend,
            ),
        }
        kinds: dict[str, tuple[str, Callable[[], nn.Module]]] = {
            MAMBA: (mamba, mambas[mamba]),
            ATTENTION: ("attention", lambda: WindowAttention(d_model, n_heads=n_heads, memory=memory)),
        }
        with_experts = expert_layers(len(letters), moe_every, moe_layers) if experts else frozenset()
        self.embedding = Linear(in_features, d_model)
        self.layers = nn.ModuleList(
            Block(
                kinds[letter][1](),
                Experts(d_model, d_ff, n_experts=experts, top_k=top_k)
                if layer in with_experts
                else SwiGLU(d_model, d_ff),
            )
            for layer, letter in enumerate(letters)
        )
        self.norm_f = RMSNorm(d_model)
        self.resets = resets
        self.balance_coef = balance_coef

        # Each entry of the state: the layers it holds and what they call it; then its shape without B.
        self._entries: dict[str, tuple[str, list[int]]] = {}
        for layer, memory_1 in enumerate(self._initial_memories(1)):
            for leaf in memory_1:
                key = f"{kinds[letters[layer]][0]}_{leaf}"
                self._entries.setdefault(key, (leaf, []))[1].append(layer)
        self._state_shapes = {key: leaf.shape[1:] for key, leaf in self.initial_state(1).items()}

    def initial_state(self, batch_size: int) -> TensorDict:
        return TensorDict(self._stacked(self._initial_memories(batch_size)), batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        is_init_BT = self.resets(is_init)
        u_BTD = self._embed(x)
        leaving, loads = [], {}
        memories = self._memories(x, state, is_init)
        for layer, (block, memory) in enumerate(zip(self.layers, memories, strict=True)):
            u_BTD, memory, load = block(u_BTD, memory, is_init_BT)
            leaving.append(memory)
            if load is not None:
                loads[layer] = load
        self._report(loads)
        return self.norm_f(u_BTD), TensorDict(self._stacked(leaving), batch_size=state.batch_size)

    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        """For each layer ``[B, T, T]``.

        The mean over heads of attention's weights, or of the sizes of Mamba's hidden attention (Ali et al.
        2024, arXiv:2403.01590).
        """
        is_init_BT = self.resets(is_init)
        u_BTD, maps = self._embed(x), []
        for block, memory in zip(self.layers, self._memories(x, state, is_init), strict=True):
            maps.append(block.mixer.attention_map(block.norm(u_BTD), memory, is_init_BT))
            u_BTD, _, _ = block(u_BTD, memory, is_init_BT)
        return maps

    def _embed(self, x_BTF: Tensor) -> Tensor:
        # The residual sum keeps the parameters' precision under autocast.
        return self.embedding(x_BTF).to(self.norm_f.weight.dtype)

    def _initial_memories(self, batch_size: int) -> list[Memory]:
        return [block.mixer.initial_state(batch_size) for block in self.layers]

    def _memories(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Memory]:
        """Each layer's part of the state."""
        entries = self.entries(x, state, is_init, self._state_shapes)
        memories: list[Memory] = [{} for _ in self.layers]
        for key, (leaf, layers) in self._entries.items():
            for layer, part in zip(layers, entries[key].unbind(dim=1), strict=True):
                memories[layer][leaf] = part
        return memories

    def _stacked(self, memories: list[Memory]) -> dict[str, Tensor]:
        """The state's entries of all layers' parts; where a kind has one layer, views."""
        entries = {}
        for key, (leaf, layers) in self._entries.items():
            parts = [memories[layer][leaf] for layer in layers]
            entries[key] = parts[0][:, None] if len(parts) == 1 else torch.stack(parts, dim=1)
        return entries

    def _report(self, loads: dict[int, Load]) -> None:
        """Sets `auxiliary_loss`, and `metrics` where this pass measured them."""
        self.auxiliary_loss = None
        if loads:
            balance_L = torch.stack([load.balance for load in loads.values()])
            self.auxiliary_loss = self.balance_coef * balance_L.sum()
            self.metrics = {
                f"expert_usage/layer{layer}_expert{expert}": share
                for layer, load in loads.items()
                for expert, share in enumerate(load.usage_E.unbind())
            }
