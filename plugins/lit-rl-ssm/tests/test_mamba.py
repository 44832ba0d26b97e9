"""The trunk `mamba` keeps lit_rl's contract, computes the paper's block, and holds mamba_ssm's parameters.

Shapes: B rows, T time steps, D = d_model, E channels, N = d_state.
"""

import math

import pytest
import torch
from lit_rl_ssm.mamba import Mamba, MambaMixer
from torch import Tensor
from torch.nn.functional import silu, softplus

from lit_rl import registry
from lit_rl.testing import TrunkConformance
from lit_rl.testing.trunk_checks import Subject
from lit_rl.testing.trunk_checks.contract import check_no_leak_between_episodes

torch.set_num_threads(1)

# Of `Mamba(d_model, d_state, d_conv, expand)` in mamba_ssm, for four sizes.
NAMES_AND_SHAPES = {
    (16, 16, 4, 2): {
        "A_log": (32, 16),
        "D": (32,),
        "in_proj.weight": (64, 16),
        "conv1d.weight": (32, 1, 4),
        "conv1d.bias": (32,),
        "x_proj.weight": (33, 32),
        "dt_proj.weight": (32, 1),
        "dt_proj.bias": (32,),
        "out_proj.weight": (16, 32),
    },
    (128, 16, 4, 2): {
        "A_log": (256, 16),
        "D": (256,),
        "in_proj.weight": (512, 128),
        "conv1d.weight": (256, 1, 4),
        "conv1d.bias": (256,),
        "x_proj.weight": (40, 256),
        "dt_proj.weight": (256, 8),
        "dt_proj.bias": (256,),
        "out_proj.weight": (128, 256),
    },
    (100, 64, 3, 1): {
        "A_log": (100, 64),
        "D": (100,),
        "in_proj.weight": (200, 100),
        "conv1d.weight": (100, 1, 3),
        "conv1d.bias": (100,),
        "x_proj.weight": (135, 100),
        "dt_proj.weight": (100, 7),
        "dt_proj.bias": (100,),
        "out_proj.weight": (100, 100),
    },
    (768, 16, 4, 2): {
        "A_log": (1536, 16),
        "D": (1536,),
        "in_proj.weight": (3072, 768),
        "conv1d.weight": (1536, 1, 4),
        "conv1d.bias": (1536,),
        "x_proj.weight": (80, 1536),
        "dt_proj.weight": (1536, 48),
        "dt_proj.bias": (1536,),
        "out_proj.weight": (768, 1536),
    },
}


class TestMamba(TrunkConformance):
    trunk = Mamba
    options = (
        {"d_model": 16},
        {"d_model": 10, "n_layers": 2, "d_state": 3, "d_conv": 1, "expand": 3, "backend": "torch"},
    )


def literal_block(p: dict[str, Tensor], x: Tensor, conv: Tensor, h: Tensor, is_init: Tensor):
    """Gu & Dao 2023, section 3 and figure 3, one row and one step at a time."""
    rank, d_state = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    rows = []
    for b in range(x.shape[0]):
        window, state, outputs = conv[b], h[b], []
        for t in range(x.shape[1]):
            if is_init[b, t]:
                window, state = torch.zeros_like(window), torch.zeros_like(state)
            u, z = (p["in_proj.weight"] @ x[b, t]).chunk(2)
            taps = torch.cat([window, u[:, None]], dim=1)
            window = taps[:, 1:]
            u = silu((taps * p["conv1d.weight"][:, 0]).sum(dim=1) + p["conv1d.bias"])
            selected = p["x_proj.weight"] @ u
            r, B, C = selected[:rank], selected[rank : rank + d_state], selected[rank + d_state :]
            dt = softplus(p["dt_proj.weight"] @ r + p["dt_proj.bias"])
            A = -torch.exp(p["A_log"])
            state = torch.exp(dt[:, None] * A) * state + torch.outer(dt * u, B)
            y = (state @ C + p["D"] * u) * silu(z)
            outputs.append(p["out_proj.weight"] @ y)
        rows.append((torch.stack(outputs), window, state))
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def disturbed(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.double()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("steps", "piece"), [(1, 19), (19, 19), (19, 18), (19, 5), (19, 1)])
def test_mixer_equals_the_literal_block(monkeypatch, steps, piece, backend):
    monkeypatch.setattr("lit_rl_ssm.blocks.PIECE", 3 * 20 * piece)
    torch.manual_seed(steps)
    mixer = disturbed(MambaMixer(10, d_state=5, dt_rank=2, backend=backend))
    x = torch.randn(3, steps, 10).double().requires_grad_()
    state = {key: torch.randn_like(leaf).requires_grad_() for key, leaf in mixer.initial_state(3).items()}
    is_init = torch.rand(3, steps) < 0.2
    parameters = dict(mixer.named_parameters())
    y, last = mixer(x, state, is_init)
    found = [y, last["conv"], last["ssm"]]
    expected = literal_block(parameters, x, state["conv"], state["ssm"], is_init)
    weights = [torch.randn_like(tensor) for tensor in expected]
    sources = [x, *state.values(), *parameters.values()]
    for tensors in (found, expected):
        total = sum((tensor * weight).sum() for tensor, weight in zip(tensors, weights, strict=True))
        tensors += torch.autograd.grad(total, sources)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for last_steps in (1, steps):
        torch.testing.assert_close(mixer.last_steps(x, state, is_init, last_steps), y[:, -last_steps:])


@pytest.mark.parametrize("size", NAMES_AND_SHAPES, ids=str)
def test_parameters_are_those_of_mamba_ssm(size):
    d_model, d_state, d_conv, expand = size
    mixer = MambaMixer(d_model, d_state=d_state, d_conv=d_conv, expand=expand)
    shapes = {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()}
    assert shapes == NAMES_AND_SHAPES[size]


def test_initial_values_are_those_of_mamba_ssm():
    mixer = MambaMixer(128)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(256, 16))
    assert (mixer.D == 1).all()
    dt = softplus(mixer.dt_proj.bias.double())
    assert dt.min() > 1e-3 * (1 - 1e-3)
    assert dt.max() < 1e-1 * (1 + 1e-3)
    # Log-uniform: half of them below the geometric mean.
    assert 0.35 < (dt < 1e-2).double().mean() < 0.65
    assert mixer.dt_proj.weight.abs().max() <= 8**-0.5


def test_dt_rank_may_be_given():
    assert MambaMixer(32, dt_rank=5).dt_proj.weight.shape == (64, 5)
    assert Mamba(3, d_model=32, dt_rank=5).layers[0].mixer.dt_proj.weight.shape == (64, 5)


def test_name_leads_to_the_class():
    assert registry.class_path("mamba") == f"{Mamba.__module__}.{Mamba.__name__}"


def features(trunk: Mamba, steps: int = 20):
    x = torch.randn(2, steps, trunk.in_features)
    is_init = torch.zeros(2, steps, dtype=torch.bool)
    is_init[:, steps // 2] = True
    return x, trunk.initial_state(2), is_init


def test_a_long_pass_equals_single_steps():
    torch.manual_seed(0)
    trunk = Mamba(4, d_model=8, n_layers=2).double()
    x, is_init = torch.randn(2, 1024, 4).double(), torch.rand(2, 1024) < 0.01
    with torch.no_grad():
        whole, last = trunk(x, trunk.initial_state(2), is_init)
        state, steps = trunk.initial_state(2), []
        for t in range(1024):
            y, state = trunk(x[:, t : t + 1], state, is_init[:, t : t + 1])
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-10)
    for key, leaf in last.items():
        torch.testing.assert_close(state[key], leaf, rtol=0, atol=1e-10)


def test_leaky_fails_the_check_of_leaks():
    check_no_leak_between_episodes(Subject(Mamba, {"d_model": 8}))
    with pytest.raises(AssertionError, match="reset"):
        check_no_leak_between_episodes(Subject(Mamba, {"d_model": 8, "reset": "leaky"}))


def test_strict_reset_forgets_and_leaky_does_not():
    torch.manual_seed(0)
    strict = Mamba(3, d_model=16, n_layers=2)
    leaky = Mamba(3, d_model=16, n_layers=2, reset="leaky")
    leaky.load_state_dict(strict.state_dict())
    x, state, is_init = features(strict)
    never = torch.zeros_like(is_init)
    alone, _ = strict(x[:, 10:], state, never[:, 10:])
    torch.testing.assert_close(strict(x, state, is_init)[0][:, 10:], alone)
    leaked, _ = leaky(x, state, is_init)
    torch.testing.assert_close(leaked, strict(x, state, never)[0])
    assert (leaked[:, 10:] - alone).abs().max() > 1e-3


def test_hidden_attention_reproduces_each_layer_and_stops_at_resets():
    torch.manual_seed(0)
    trunk = disturbed(Mamba(3, d_model=8, n_layers=2))
    x, state, is_init = (t.double() if t.is_floating_point() else t for t in features(trunk.float()))
    trunk.double()
    layers = trunk.hidden_attention(x, state, is_init)
    assert len(layers) == 2
    u = trunk.embedding(x)
    for layer, (block, map_BETT) in enumerate(zip(trunk.layers, layers, strict=True)):
        assert map_BETT.shape == (2, 16, 20, 20)
        assert not map_BETT[:, :, 10:, :10].any()
        assert map_BETT[:, :, 5, :6].all()
        mixer, memory = block.mixer, {key: leaf[:, layer] for key, leaf in state.items()}
        into, gate, _ = mixer._convolve(block.norm(u), memory, is_init)
        y = torch.einsum("bets,bse->bte", map_BETT, into) + mixer.D * into
        u = u + mixer.out_proj(y * silu(gate))
    torch.testing.assert_close(trunk.norm_f(u), trunk(x, state, is_init)[0], rtol=0, atol=1e-10)

    maps = trunk.attention_maps(x, state, is_init)
    for map_BTT, map_BETT in zip(maps, layers, strict=True):
        torch.testing.assert_close(map_BTT, map_BETT.abs().mean(dim=1))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"d_model": 0}, "d_model must be at least 1, not 0"),
        ({"n_layers": 0}, "n_layers must be at least 1, not 0"),
        ({"d_state": -1}, "d_state must be at least 1, not -1"),
        ({"d_conv": 0}, "d_conv must be at least 1, not 0"),
        ({"expand": 0}, "expand must be at least 1, not 0"),
        ({"reset": "soft"}, "reset must be one of strict, leaky, not 'soft'"),
        ({"backend": "tpu"}, "backend must be one of auto, torch, cuda, not 'tpu'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, line):
    with pytest.raises(ValueError, match=line) as refusal:
        Mamba(3, **options)
    assert "\n" not in str(refusal.value)


def test_backend_cuda_without_its_package_is_refused_in_one_line():
    with pytest.raises(ImportError, match="selective_scan_fn needs the package mamba_ssm") as refusal:
        Mamba(3, backend="cuda")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("dt_rank", "line"),
    [(0, "dt_rank must be at least 1, not 0"), ("low", "dt_rank must be auto or a number, not 'low'")],
)
def test_bad_dt_rank_is_refused(dt_rank, line):
    with pytest.raises(ValueError, match=line):
        Mamba(3, d_model=8, dt_rank=dt_rank)


def test_state_of_another_shape_is_refused():
    trunk = Mamba(3, d_model=8)
    x, _, is_init = features(trunk)
    with pytest.raises(ValueError, match="the state given has 'conv'"):
        trunk(x, Mamba(3, d_model=8, n_layers=2).initial_state(2), is_init)


def test_step_sizes_keep_their_precision_under_autocast():
    """The bias, which sets how long a channel remembers, is not rounded to bfloat16."""
    mixer = MambaMixer(16)
    with torch.no_grad():
        mixer.dt_proj.weight.zero_()
        mixer.dt_proj.bias.fill_(math.log(math.expm1(0.0123)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            dt, _, _ = mixer._select(torch.randn(2, 3, 32))
    torch.testing.assert_close(dt, torch.full_like(dt, 0.0123), rtol=1e-5, atol=0)
