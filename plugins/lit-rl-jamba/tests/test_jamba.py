"""The trunk `jamba` keeps lit_rl's contract for any ratio and order of layers, and balances its experts."""

import copy

import pytest
import torch
from lit_rl_jamba.jamba import Jamba

from lit_rl import registry
from lit_rl.testing import TrunkConformance
from lit_rl.testing.trunk_checks import Subject, contract, platforms

torch.set_num_threads(1)

TINY = {"d_model": 8, "d_ff": 6, "d_state": 3, "n_heads": 2, "memory": 5}


class TestJamba(TrunkConformance):
    """The whole kit: both kinds of layers, both kinds of feed-forward."""

    trunk = Jamba
    # At width 8 bfloat16 sends a step to another expert: no mistake, but more than a rounding.
    options = ({**TINY, "d_model": 16, "pattern": "1:1", "experts": 3},)


RATIOS = {
    "3:1": {"pattern": "3:1"},
    "1:0": {"pattern": "1:0"},
    "7:1": {"pattern": "7:1"},
    "1:3": {"pattern": "1:3"},
    "0:1": {"pattern": "0:1"},
    "two blocks, spelled": {"pattern": "am", "n_layers": 4},
    "mamba2": {"pattern": "1:1", "mamba": "mamba2", "headdim": 4},
    "mamba2, experts": {"pattern": "1:0", "mamba": "mamba2", "headdim": 4, "experts": 4, "moe_every": 1},
    "one expert a token": {"pattern": "1:1", "experts": 3, "top_k": 1, "moe_layers": [0]},
}


# The layers go through the whole kit above and in their own packages; what ratio and order add is whose state
# is whose. Gradients are compared in float64.
@pytest.mark.parametrize("options", RATIOS.values(), ids=RATIOS)
@pytest.mark.parametrize(
    "check",
    [
        contract.check_spec,
        contract.check_values_agree,
        contract.check_reset_starts_afresh,
        contract.check_no_leak_between_rows,
        contract.check_every_parameter_learns,
        contract.check_lengths,
        platforms.check_float64,
    ],
)
def test_ratios_and_orders(check, options):
    check(Subject(Jamba, {**TINY, **options}))


def test_name_leads_to_the_class():
    assert registry.class_path("jamba") == f"{Jamba.__module__}.{Jamba.__name__}"


def run(trunk, T, B=2, is_init_BT=None, seed=0):
    x_BTF = torch.randn(B, T, trunk.in_features, generator=torch.Generator().manual_seed(seed))
    never_BT = torch.zeros(B, T, dtype=torch.bool)
    return x_BTF, trunk.initial_state(B), never_BT if is_init_BT is None else is_init_BT


def test_a_long_pass_equals_single_steps():
    torch.manual_seed(0)
    trunk = Jamba(5, **TINY, experts=3)
    is_init_BT = torch.zeros(2, 1024, dtype=torch.bool)
    is_init_BT[0, [0, 511, 512, 1023]] = is_init_BT[1, 700] = True
    x_BTF, state, _ = run(trunk, 1024)
    with torch.no_grad():
        whole_BTD, last = trunk(x_BTF, state, is_init_BT)
        steps = []
        for t in range(1024):
            y_B1D, state = trunk(x_BTF[:, t : t + 1], state, is_init_BT[:, t : t + 1])
            steps.append(y_B1D)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole_BTD, rtol=0, atol=1e-5)
    for key, leaf in last.items():
        torch.testing.assert_close(state[key], leaf, rtol=0, atol=1e-5)


def test_layers_stand_where_the_pattern_says_and_share_entries_of_the_state():
    trunk = Jamba(5, **TINY, experts=2)
    assert [type(block.mixer).__name__ for block in trunk.layers] == [
        "MambaMixer",
        "MambaMixer",
        "WindowAttention",
        "MambaMixer",
    ]
    assert [type(block.feedforward).__name__ for block in trunk.layers] == [
        "SwiGLU",
        "Experts",
        "SwiGLU",
        "Experts",
    ]
    counts = {key: leaf.shape[1] for key, leaf in trunk.initial_state(2).items()}
    assert {key.split("_")[0] for key in counts} == {"mamba", "attention"}
    assert all(count == (3 if key.startswith("mamba") else 1) for key, count in counts.items())


def test_equals_its_equations_layer_by_layer():
    torch.manual_seed(0)
    trunk = Jamba(5, **TINY, pattern="3:1", n_layers=8)
    x_BTF, state, is_init_BT = run(trunk, 9)
    u_BTD = trunk.embedding(x_BTF)
    for block in trunk.layers:
        y_BTD, _ = block.mixer(block.norm(u_BTD), block.mixer.initial_state(2), is_init_BT)
        u_BTD = u_BTD + y_BTD
        u_BTD = u_BTD + block.feedforward(block.norm_ff(u_BTD))[0]
    torch.testing.assert_close(trunk(x_BTF, state, is_init_BT)[0], trunk.norm_f(u_BTD))


def test_balance_reaches_the_routers_and_usage_sums_to_1():
    torch.manual_seed(0)
    trunk = Jamba(5, **TINY, experts=4, balance_coef=0.5)
    trunk(*run(trunk, 30))
    gradient = torch.autograd.grad(trunk.auxiliary_loss, trunk.layers[3].feedforward.router)[0]
    assert gradient.any()
    names = {f"expert_usage/layer{layer}_expert{expert}" for layer in (1, 3) for expert in range(4)}
    assert set(trunk.metrics) == names
    for layer in (1, 3):
        shares = torch.stack([trunk.metrics[f"expert_usage/layer{layer}_expert{e}"] for e in range(4)])
        assert not shares.requires_grad
        torch.testing.assert_close(shares.sum(), torch.tensor(1.0))


def test_balance_is_summed_over_layers_times_its_coefficient():
    torch.manual_seed(0)
    trunk = Jamba(5, **TINY, experts=4, balance_coef=0.5)
    for layer in (1, 3):  # equal probabilities: each layer's loss is exactly 1, however ties are broken
        torch.nn.init.zeros_(trunk.layers[layer].feedforward.router)
    trunk(*run(trunk, 30))
    torch.testing.assert_close(trunk.auxiliary_loss, torch.tensor(2 * 0.5))


def test_a_copy_after_a_training_pass_computes_the_same():
    """The loss of that pass stays behind: its graph cannot be copied."""
    torch.manual_seed(0)
    trunk = Jamba(5, **TINY, experts=4)
    given = run(trunk, 30)
    y_BTD, _ = trunk(*given)
    copied = copy.deepcopy(trunk)
    assert trunk.auxiliary_loss.requires_grad
    assert copied.auxiliary_loss is None
    torch.testing.assert_close(copied(*given)[0], y_BTD, rtol=0, atol=0)
    torch.testing.assert_close(copied.auxiliary_loss, trunk.auxiliary_loss, rtol=0, atol=0)


def test_no_auxiliary_loss_without_experts_or_outside_training():
    trunk = Jamba(5, **TINY)
    trunk(*run(trunk, 4))
    assert trunk.auxiliary_loss is None
    assert trunk.metrics == {}
    trunk = Jamba(5, **TINY, experts=4)
    trunk(*run(trunk, 4))
    assert trunk.auxiliary_loss is not None
    with torch.no_grad():  # acting: nothing is left of the graph before
        trunk(*run(trunk, 1))
    assert trunk.auxiliary_loss is None
    assert trunk.metrics


@pytest.mark.parametrize(
    ("options", "rows", "found"),
    [
        ({"pattern": "7:1"}, 2, r"'mamba_conv' \[2, 7, 16, 3\]"),
        ({"pattern": "0:1"}, 2, "no 'mamba_conv'"),
        ({"memory": 6}, 2, r"'attention_kv' \[2, 1, 6, 16\]"),
        ({"d_model": 16}, 2, r"'mamba_conv' \[2, 3, 32, 3\]"),
        ({"d_state": 4}, 2, r"'mamba_ssm' \[2, 3, 16, 4\]"),
        ({}, 1, r"'mamba_conv' \[1, 3, 16, 3\]"),
        ({}, 3, r"'mamba_conv' \[3, 3, 16, 3\]"),
    ],
)
def test_the_state_of_another_trunk_or_of_other_rows_is_refused(options, rows, found):
    trunk, other = Jamba(5, **TINY), Jamba(5, **{**TINY, **options})
    x_BTF, _, is_init_BT = run(trunk, 3)
    with pytest.raises(ValueError, match=f"the state given has {found}, Jamba keeps") as refusal:
        trunk(x_BTF, other.initial_state(rows), is_init_BT)
    assert "\n" not in str(refusal.value)


def test_leaky_resets_are_none():
    torch.manual_seed(0)
    strict = Jamba(5, **TINY)
    leaky = Jamba(5, **TINY, reset="leaky")
    leaky.load_state_dict(strict.state_dict())
    is_init_BT = torch.zeros(2, 9, dtype=torch.bool)
    is_init_BT[0, 4] = True
    x_BTF, state, never_BT = run(strict, 9)
    y_BTD = leaky(x_BTF, state, is_init_BT)[0]
    torch.testing.assert_close(y_BTD, strict(x_BTF, state, never_BT)[0])
    assert (y_BTD - strict(x_BTF, state, is_init_BT)[0])[0, 4:].abs().max() > 1e-3


@pytest.mark.parametrize("mamba", ["mamba", "mamba2"])
def test_maps_are_causal_and_stop_at_resets(mamba):
    torch.manual_seed(0)
    trunk = Jamba(5, **TINY, headdim=4, mamba=mamba)
    is_init_BT = torch.zeros(2, 9, dtype=torch.bool)
    is_init_BT[:, 4] = True
    maps = trunk.attention_maps(*run(trunk, 9, is_init_BT=is_init_BT))
    assert len(maps) == 4
    for map_BTT in maps:
        assert map_BTT.shape == (2, 9, 9)
        assert (map_BTT >= 0).all()
        assert map_BTT.tril().equal(map_BTT)
        assert not map_BTT[:, 4:, :4].any()
        assert map_BTT[:, 4:, 4:].any()
    torch.testing.assert_close(maps[2][:, 4].sum(-1), torch.ones(2))  # a lone step of attention


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pattern": "0:0"}, "pattern '0:0' spells no layer"),
        ({"pattern": 181}, "quote it"),
        ({"n_layers": 2}, "n_layers=2 is no number of whole blocks"),
        ({"d_model": 0}, "d_model must be at least 1"),
        ({"d_ff": 0}, "d_ff must be at least 1"),
        ({"mamba": "mamba3"}, "mamba must be one of mamba, mamba2, not 'mamba3'"),
        ({"reset": "never"}, "reset must be one of strict, leaky, not 'never'"),
        ({"experts": -1}, "experts must be at least 0"),
        ({"experts": 1}, "top_k must be from 1 to the number of experts, 1, not 2"),
        ({"experts": 4, "moe_every": 9}, "moe_every=9 reaches none of the 4 layers"),
        ({"experts": 4, "moe_every": 0}, "moe_every must be at least 1"),
        ({"moe_layers": [1]}, r"moe_layers is \[1\] but experts is 0"),
        ({"experts": 4, "moe_layers": [4]}, "moe_layers must name some of the layers 0 to 3"),
        ({"balance_coef": -0.1}, "balance_coef must be at least 0"),
        ({"balance_coef": float("nan")}, "balance_coef must be at least 0"),
        ({"n_heads": 3}, "n_heads"),
        ({"memory": 0}, "memory"),
        ({"d_state": 0}, "d_state"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, line):
    with pytest.raises(ValueError, match=line) as refusal:
        Jamba(5, **{**TINY, **options})
    assert "\n" not in str(refusal.value)
