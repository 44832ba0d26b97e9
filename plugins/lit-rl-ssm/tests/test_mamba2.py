"""The trunk `mamba2`: the contract, the paper's recurrence step by step, published names and initial values.

Shapes: B rows, T time steps, D = d_model, E channels, H heads, P = headdim, N = d_state, W taps.
"""

import math

import pytest
import torch
from lit_rl_ssm.mamba2 import Mamba2, Mamba2Mixer
from torch.nn.functional import silu, softplus

from lit_rl import registry
from lit_rl.testing import TrunkConformance
from lit_rl.testing.trunk_checks.contract import check_reset_starts_afresh
from lit_rl.testing.trunk_checks.platforms import check_compile
from lit_rl.testing.trunk_checks.runs import Subject
from lit_rl.trunks import Linear

torch.set_num_threads(1)

SMALL = {"d_model": 8, "headdim": 4, "d_state": 3}


class TestMamba2(TrunkConformance):
    trunk = Mamba2
    options = (SMALL, SMALL | {"chunk_size": 5, "backend": "torch"})


class TestMamba2Options(TrunkConformance):
    trunk = Mamba2
    options = (
        {},
        SMALL | {"n_layers": 2},
        SMALL | {"expand": 3, "d_conv": 2},
        SMALL | {"expand": 3, "d_conv": 2, "chunk_size": 1, "backend": "torch"},
    )

    def test_conformance(self, subject, check):
        if check is check_compile:
            pytest.skip("takes many seconds, and the options above went through it")
        super().test_conformance(subject, check)


def test_name_leads_to_the_class():
    assert registry.class_path("mamba2") == f"{Mamba2.__module__}.{Mamba2.__name__}"


# The mixer against the equations, one step and one row of numbers at a time.


def recurrence(mixer, x_BTD, state, is_init_BT):
    """Mamba-2 as the paper writes it, step by step; a reset zeroes h and the convolution's window."""
    E, N, H = mixer.out_proj.in_features, state["ssm"].shape[-1], len(mixer.A_log)
    window_BXP, h_BHPN = state["conv"], state["ssm"]
    outputs = []
    for x_BD, is_init_B in zip(x_BTD.unbind(1), is_init_BT.unbind(1), strict=True):
        window_BXP = torch.where(is_init_B[:, None, None], 0.0, window_BXP)
        h_BHPN = torch.where(is_init_B[:, None, None, None], 0.0, h_BHPN)
        z_BE, new_BX, dt_BH = (x_BD @ mixer.in_proj.weight.t()).split([E, E + 2 * N, H], dim=1)
        taps_BXW = torch.cat([window_BXP, new_BX[:, :, None]], dim=2)
        window_BXP = taps_BXW[:, :, 1:]
        xBC = silu((taps_BXW * mixer.conv1d.weight[:, 0]).sum(dim=2) + mixer.conv1d.bias)
        x_BE, B_BN, C_BN = xBC.split([E, N, N], dim=1)
        x_BHP = x_BE.unflatten(1, (H, -1))
        dt_BH = softplus(dt_BH + mixer.dt_bias)
        decay_BH = torch.exp(-torch.exp(mixer.A_log) * dt_BH)
        h_BHPN = torch.einsum("bh,bhpn->bhpn", decay_BH, h_BHPN) + torch.einsum(
            "bh,bhp,bn->bhpn", dt_BH, x_BHP, B_BN
        )
        y_BHP = torch.einsum("bhpn,bn->bhp", h_BHPN, C_BN) + mixer.D[:, None] * x_BHP
        y_BE = y_BHP.flatten(1) * silu(z_BE)
        y_BE = y_BE / torch.sqrt(y_BE.square().mean(dim=1, keepdim=True) + 1e-5) * mixer.norm.weight
        outputs.append(y_BE @ mixer.out_proj.weight.t())
    return torch.stack(outputs, dim=1), {"conv": window_BXP, "ssm": h_BHPN}


def mixer_and_inputs(steps, reset_rate, rows=3, **options):
    torch.manual_seed(steps)
    mixer = Mamba2Mixer(8, **({"d_state": 6, "headdim": 4} | options)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x_BTD = torch.randn(rows, steps, 8, dtype=torch.float64, requires_grad=True)
    state = {k: torch.randn_like(v).requires_grad_() for k, v in mixer.initial_state(rows).items()}
    return mixer, x_BTD, state, torch.rand(rows, steps) < reset_rate


def values_and_gradients(layer, mixer, x_BTD, state, is_init_BT):
    y_BTD, last = layer(x_BTD, state, is_init_BT)
    values = {"y": y_BTD, **last}
    generator = torch.Generator().manual_seed(0)
    total = sum((v * torch.randn(v.shape, generator=generator).double()).sum() for v in values.values())
    wanted = {"x": x_BTD, **state, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return values, dict(zip(wanted, gradients, strict=True))


def assert_near(found, expected, tolerance, name):
    """Equal within `tolerance` of the largest number, or of 1 where that is smaller."""
    scale = expected.abs().amax().clamp(min=1).item() if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("reset_rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (1, {}),
        (2, {}),
        (37, {}),
        (37, {"chunk_size": 5}),
        (40, {"chunk_size": 8, "d_conv": 2, "headdim": 16}),
        (40, {"chunk_size": 64, "expand": 1, "d_conv": 1}),
        (1024, {}),
    ],
)
def test_mixer_equals_the_recurrence(steps, options, reset_rate, backend):
    mixer, *inputs = mixer_and_inputs(steps, reset_rate, backend=backend, **options)
    found = values_and_gradients(mixer, mixer, *inputs)
    expected = values_and_gradients(lambda *i: recurrence(mixer, *i), mixer, *inputs)
    for found_of, expected_of in zip(found, expected, strict=True):
        for name, reference in expected_of.items():
            assert_near(found_of[name], reference, 1e-10, name)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", [{}, {"d_conv": 1}, {"d_conv": 2, "headdim": 16, "expand": 4}])
def test_acting_equals_the_recurrence(backend, options):
    mixer, x_BTD, state, is_init_BT = mixer_and_inputs(9, 0.3, rows=6, backend=backend, **options)
    expected, last = recurrence(mixer, x_BTD, state, is_init_BT)
    outputs = []
    with torch.no_grad():
        for t in range(9):
            y, state = mixer(x_BTD[:, t : t + 1], state, is_init_BT[:, t : t + 1])
            outputs.append(y)
    assert_near(torch.cat(outputs, dim=1), expected, 1e-10, "y")
    for name, reference in last.items():
        assert_near(state[name], reference, 1e-10, name)


def test_a_projection_that_is_more_than_its_weight_is_called_when_acting():
    """As an adapter around it is: one compiled call would read the weight alone."""

    class Doubled(Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    mixer, x_BTD, state, is_init_BT = mixer_and_inputs(1, 0.0)
    mixer.out_proj.__class__ = Doubled
    expected, _ = mixer(x_BTD, state, is_init_BT)
    with torch.no_grad():
        found, _ = mixer(x_BTD, state, is_init_BT)
    assert_near(found, expected.detach(), 1e-10, "y")


@pytest.mark.parametrize("numbers", [1, 3 * 16 * 7, 3 * 16 * 37])
def test_pieces_of_a_long_sequence_join(monkeypatch, numbers):
    """Of one step, of 7 and of all 37; 3 rows of 16 channels."""
    mixer, *inputs = mixer_and_inputs(37, 0.2)
    expected = values_and_gradients(lambda *i: recurrence(mixer, *i), mixer, *inputs)
    monkeypatch.setattr("lit_rl_ssm.blocks.PIECE", numbers)
    lengths = []
    piece = mixer.piece
    monkeypatch.setattr(mixer, "piece", lambda x, *others: lengths.append(x.shape[1]) or piece(x, *others))
    found = values_and_gradients(mixer, mixer, *inputs)
    torch.testing.assert_close(mixer.last_steps(*inputs, 5), mixer(*inputs)[0][:, -5:])
    assert max(lengths) == max(1, numbers // 48)
    for found_of, expected_of in zip(found, expected, strict=True):
        for name, reference in expected_of.items():
            assert_near(found_of[name], reference, 1e-10, name)


def test_fast_and_slow_decays_stay_finite_and_exact():
    """Steps of any size: within one chunk the decays range from 1 - 1e-9 to e^-20000 and below."""
    mixer, x_BTD, state, is_init_BT = mixer_and_inputs(48, 0.1)
    with torch.no_grad():
        mixer.A_log += torch.linspace(-8, 8, len(mixer.A_log))
        mixer.in_proj.weight[-len(mixer.A_log) :] *= 20
    exact = values_and_gradients(lambda *i: recurrence(mixer, *i), mixer, x_BTD, state, is_init_BT)
    mixer = mixer.float()
    x_BTD = x_BTD.detach().float().requires_grad_()
    state = {k: v.detach().float().requires_grad_() for k, v in state.items()}
    found = values_and_gradients(mixer, mixer, x_BTD, state, is_init_BT)
    for found_of, exact_of in zip(found, exact, strict=True):
        for name, reference in exact_of.items():
            assert_near(found_of[name], reference, 1e-4, name)


# What the literature fixes.


@pytest.mark.parametrize(
    ("d_model", "options", "shapes"),
    [
        (
            128,
            {},
            {
                "dt_bias": (8,),
                "A_log": (8,),
                "D": (8,),
                "in_proj.weight": (648, 128),
                "conv1d.weight": (384, 1, 4),
                "conv1d.bias": (384,),
                "norm.weight": (256,),
                "out_proj.weight": (128, 256),
            },
        ),
        (
            768,  # the smallest of the published models
            {"d_state": 128, "headdim": 64},
            {
                "dt_bias": (24,),
                "A_log": (24,),
                "D": (24,),
                "in_proj.weight": (3352, 768),
                "conv1d.weight": (1792, 1, 4),
                "conv1d.bias": (1792,),
                "norm.weight": (1536,),
                "out_proj.weight": (768, 1536),
            },
        ),
        (
            6,
            {"d_state": 5, "headdim": 3, "expand": 3, "d_conv": 2},
            {
                "dt_bias": (6,),
                "A_log": (6,),
                "D": (6,),
                "in_proj.weight": (52, 6),
                "conv1d.weight": (28, 1, 2),
                "conv1d.bias": (28,),
                "norm.weight": (18,),
                "out_proj.weight": (6, 18),
            },
        ),
    ],
)
def test_parameters_are_named_and_shaped_as_in_mamba_ssm(d_model, options, shapes):
    mixer = Mamba2Mixer(d_model, **options)
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()} == shapes


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    mixer = Mamba2Mixer(256, headdim=1)  # 512 heads: enough to see distributions
    dt_H, A_H = softplus(mixer.dt_bias).detach(), mixer.A_log.detach().exp()
    assert 1e-3 <= dt_H.min() < 1.1e-3
    assert 0.09 < dt_H.max() <= 0.1
    assert abs(dt_H.log().mean().item() - math.log(1e-2)) < 0.2  # uniform in the logarithm
    assert 1 <= A_H.min() < 1.2
    assert 15.8 < A_H.max() <= 16
    assert abs(A_H.mean().item() - 8.5) < 0.6  # uniform
    assert mixer.D.eq(1).all()
    assert mixer.norm.weight.eq(1).all()


def test_hidden_attention_times_input_is_the_output():
    mixer, x_BTD, state, is_init_BT = mixer_and_inputs(37, 0.15)
    state["ssm"] = torch.zeros_like(state["ssm"])
    with torch.no_grad():
        mixer.D.zero_()
        attention_BHTT = mixer.hidden_attention(x_BTD, state, is_init_BT)
        _, selected, _ = mixer._select(mixer.in_proj(x_BTD), state, is_init_BT)
        y_BTHP, _ = mixer._scan(selected, state["ssm"], is_init_BT)
    found_BTHP = torch.einsum("bhts,bshp->bthp", attention_BHTT, selected.x_BTHP)
    torch.testing.assert_close(found_BTHP, y_BTHP, rtol=0, atol=1e-10)
    episode_BT = is_init_BT.cumsum(1)
    across_BTT = episode_BT[:, :, None] != episode_BT[:, None]
    later_TT = torch.ones(37, 37, dtype=torch.bool).triu(1)
    assert not attention_BHTT.masked_select((across_BTT | later_TT)[:, None]).any()
    assert attention_BHTT.masked_select(~(across_BTT | later_TT)[:, None]).all()


def test_attention_maps_are_one_a_layer():
    trunk = Mamba2(5, n_layers=3, **SMALL)
    x_BTF, is_init_BT = torch.randn(2, 9, 5), torch.zeros(2, 9, dtype=torch.bool)
    maps = trunk.attention_maps(x_BTF, trunk.initial_state(2), is_init_BT)
    assert [tuple(map_BTT.shape) for map_BTT in maps] == [(2, 9, 9)] * 3
    of_heads = trunk.hidden_attention(x_BTF, trunk.initial_state(2), is_init_BT)
    for map_BTT, map_BHTT in zip(maps, of_heads, strict=True):
        torch.testing.assert_close(map_BTT, map_BHTT.abs().mean(dim=1))


# Negative control and bad input.


def test_leaky_reset_fails_where_strict_holds():
    check_reset_starts_afresh(Subject(Mamba2, SMALL))
    with pytest.raises(AssertionError, match="episode from t="):
        check_reset_starts_afresh(Subject(Mamba2, SMALL | {"reset": "leaky"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 10, "headdim": 8}, "20 channels do not divide into heads of headdim = 8"),
        ({"backend": "gpu"}, "backend must be one of auto, torch, cuda, not 'gpu'"),
        ({"reset": "soft"}, "reset must be one of strict, leaky, not 'soft'"),
        ({"chunk_size": 65}, "chunk_size must be between 1 and 64, not 65"),
        ({"chunk_size": 0}, "chunk_size must be between 1 and 64, not 0"),
        *(
            ({size: 0}, f"{size} must be at least 1, not 0")
            for size in ("d_model", "n_layers", "d_state", "d_conv", "expand", "headdim")
        ),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Mamba2(5, **options)
    assert "\n" not in str(error.value)


def test_a_state_of_another_trunk_is_refused():
    trunk, other = Mamba2(5, **SMALL), Mamba2(5, **(SMALL | {"d_state": 4}))
    x_BTF, is_init_BT = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'ssm' \[2, 1, 4, 4, 4\], Mamba2 keeps 'ssm' \[2, 1, 4, 4, 3\]"):
        trunk(
            x_BTF,
            other.initial_state(2).exclude("conv").update(trunk.initial_state(2).select("conv")),
            is_init_BT,
        )
    with pytest.raises(ValueError, match="no 'conv'"):
        trunk(x_BTF, trunk.initial_state(2).exclude("conv"), is_init_BT)
    with pytest.raises(ValueError, match=r"'conv' \[3, "):
        trunk(x_BTF, trunk.initial_state(3), is_init_BT)
