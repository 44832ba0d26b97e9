"""Each trunk equals its papers' equations written densely, one row at a time, in values and gradients.

The oracle knows neither blocks nor a sliding cache: a row's cache and steps are one list of M + T places, a
loop over pairs of places says who sees whom, and positions are a table with an entry for every pair.
"""

import pytest
import torch
from lit_rl_transformers.gtrxl import GTrXL
from lit_rl_transformers.transformer import Transformer
from lit_rl_transformers.transformer_xl import TransformerXL
from torch.nn.functional import gelu, layer_norm, linear

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float64():
    """Trunks are built in float64: the table of sinusoids is then not rounded to float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def places(age: int, is_init_T: list[bool], memory: int) -> list[int | None]:
    """For the M cached and the T new steps of a row: the step's number in its episode, None where none is."""
    ages, now = [], age
    for is_init in is_init_T:
        now = 0 if is_init else now
        ages.append(now)
        now += 1
    cached = [age - memory + slot for slot in range(memory)]
    return [number if number >= 0 else None for number in cached] + ages


def visible(age: int, is_init_T: list[bool], memory: int) -> torch.Tensor:
    """``[T, M + T]``: which places each step sees."""
    episode, episodes = 0, [0] * memory
    for is_init in is_init_T:
        episode += is_init
        episodes.append(episode)
    exists = [number is not None for number in places(age, is_init_T, memory)]
    T = len(is_init_T)
    mask = torch.zeros(T, memory + T, dtype=torch.bool)
    for i in range(T):
        for j in range(memory + T):
            distance = memory + i - j
            in_window = 0 <= distance <= memory
            mask[i, j] = in_window and exists[j] and episodes[j] == episodes[memory + i]
    return mask


def sinusoid(distance: int, width: int) -> torch.Tensor:
    """R of one distance: sin and cos of the distance over 10000^(2k / width)."""
    angle = [distance / 10_000 ** (2 * k / width) for k in range(width // 2)]
    angle = torch.tensor(angle)
    return torch.cat([angle.sin(), angle.cos()])


def turned(x_TD: torch.Tensor, numbers: list[int], n_heads: int) -> torch.Tensor:
    """Rotary positions as products of complex numbers, head by head and step by step."""
    rows = []
    for x_D, number in zip(x_TD, numbers, strict=True):
        heads = []
        for head in x_D.chunk(n_heads):
            real, imaginary = head.chunk(2)
            k = torch.arange(len(real))
            angle = number / 10_000 ** (k / len(real))
            product = torch.complex(real, imaginary) * torch.polar(torch.ones(len(real)), angle)
            heads += [product.real, product.imag]
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def attention(mixer, x_TD, cache_ME, age, is_init_T):
    """The output ``[T, D]`` of one layer's attention for one row."""
    T, D, M, H = *x_TD.shape, mixer.memory, mixer.n_heads
    C = D // H
    q_TD, k_TD, v_TD = linear(x_TD, mixer.qkv.weight).chunk(3, dim=1)
    is_relative = hasattr(mixer, "position_bias")
    if not is_relative and hasattr(mixer, "frequencies"):
        numbers = places(age, is_init_T, M)[M:]
        q_TD, k_TD = turned(q_TD, numbers, H), turned(k_TD, numbers, H)
    keys_PD, values_PD = torch.cat([cache_ME[:, :D], k_TD]), torch.cat([cache_ME[:, D:], v_TD])
    mask_TP = visible(age, is_init_T, M)
    if is_relative:
        table = [[sinusoid(M + i - j, D) for j in range(M + T)] for i in range(T)]
        R_TPD = torch.stack([torch.stack(row) for row in table])
        r_TPD = R_TPD @ mixer.position.weight.T
    heads = []
    for h in range(H):
        part = slice(h * C, (h + 1) * C)
        q, k, v = q_TD[:, part], keys_PD[:, part], values_PD[:, part]
        if is_relative:
            content = (q + mixer.content_bias[h]) @ k.T
            position = ((q + mixer.position_bias[h])[:, None] * r_TPD[:, :, part]).sum(-1)
            scores = (content + position) / C**0.5
        else:
            scores = q @ k.T / C**0.5
        weights = scores.masked_fill(~mask_TP, -torch.inf).softmax(dim=1)
        heads.append(weights @ v)
    return linear(torch.cat(heads, dim=1), mixer.out.weight)


def gated(gate, x, y):
    """Parisotto et al. 2020, the equations of GRU-type gating."""
    W_r, W_z, W_g = gate.from_update.weight.chunk(3)
    U_r, U_z = gate.from_stream.weight.chunk(2)
    U_g = gate.from_reset_stream.weight
    r = torch.sigmoid(y @ W_r.T + x @ U_r.T)
    z = torch.sigmoid(y @ W_z.T + x @ U_z.T - gate.bias)
    h = torch.tanh(y @ W_g.T + (r * x) @ U_g.T)
    return (1 - z) * x + z * h


def dense(trunk, x, state, is_init):
    """The output ``[B, T, D]`` of a whole trunk."""
    rows = []
    for b in range(x.shape[0]):
        x_TD = linear(x[b], trunk.embed.weight, trunk.embed.bias)
        age, is_init_T = int(state["age"][b]), is_init[b].tolist()
        for number, layer in enumerate(trunk.layers):
            norm, mlp_norm, (up, _, down) = layer.attention_norm, layer.mlp_norm, layer.mlp
            normed = layer_norm(x_TD, norm.normalized_shape, norm.weight, norm.bias)
            update = attention(layer.attention, normed, state[f"kv_{number}"][b], age, is_init_T)
            is_gated = isinstance(trunk, GTrXL)
            x_TD = gated(layer.attention_gate, x_TD, gelu(update)) if is_gated else x_TD + update
            normed = layer_norm(x_TD, mlp_norm.normalized_shape, mlp_norm.weight, mlp_norm.bias)
            update = linear(gelu(linear(normed, up.weight, up.bias)), down.weight, down.bias)
            x_TD = gated(layer.mlp_gate, x_TD, gelu(update)) if is_gated else x_TD + update
        rows.append(x_TD)
    y = torch.stack(rows)
    if isinstance(trunk, GTrXL):
        return y
    return layer_norm(y, trunk.last.normalized_shape, trunk.last.weight, trunk.last.bias)


@pytest.mark.parametrize("trunk_class", [Transformer, TransformerXL, GTrXL])
@pytest.mark.parametrize("start", ["the initial state", "random caches"])
@pytest.mark.parametrize(("memory", "steps"), [(3, 20), (18, 44), (30, 12), (5, 1)])
def test_equals_dense_attention(trunk_class, start, memory, steps):
    torch.manual_seed(memory)
    trunk = trunk_class(4, d_model=8, n_layers=2, n_heads=2, memory=memory, d_ff=6)
    for parameter in trunk.parameters():  # zeros of the initialisation would hide mistakes
        parameter.data += 0.3 * torch.randn_like(parameter)
    B = 3
    x, is_init = torch.randn(B, steps, 4), torch.rand(B, steps) < 0.08
    is_init[0] = False
    state = trunk.initial_state(B)
    if start == "random caches":
        for key in trunk.cache_keys:  # random also where no step of the episode stands: it must not matter
            state[key] = torch.randn_like(state[key])
        state["age"] = torch.tensor([2, 0, 1000])
    caches = [state[key].requires_grad_() for key in trunk.cache_keys]
    found, _ = trunk(x.requires_grad_(), state, is_init)
    expected = dense(trunk, x, state, is_init)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    weight = torch.randn_like(found)
    wanted = {"x": x, **dict(zip(trunk.cache_keys, caches, strict=True)), **dict(trunk.named_parameters())}
    options = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad((found * weight).sum(), list(wanted.values()), **options)
    theirs = torch.autograd.grad((expected * weight).sum(), list(wanted.values()), **options)
    for name, one, other in zip(wanted, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
