"""GTrXL's gate gives numbers worked out by hand, and the trunk begins near the identity."""

import math

import pytest
import torch
from lit_rl_transformers.gtrxl import GRUGate, GTrXL

torch.set_num_threads(1)


def gate_of(*, W_r=0.0, W_z=0.0, W_g=0.0, U_r=0.0, U_z=0.0, U_g=0.0, b_g=0.0) -> GRUGate:
    gate = GRUGate(1, b_g)
    weights = {gate.from_update: [W_r, W_z, W_g], gate.from_stream: [U_r, U_z], gate.from_reset_stream: [U_g]}
    for linear, rows in weights.items():
        linear.weight.data = torch.tensor(rows)[:, None]
    return gate.double()


LN3 = math.log(3)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4, tanh(ln 3 / 2) = 1/2, tanh(ln 3) = 4/5


@pytest.mark.parametrize(
    ("weights", "x", "y", "expected"),
    [
        # z = sigmoid(0 - ln 3) = 1/4, h = tanh(0) = 0: 3/4 * 2.
        ({"b_g": LN3}, 2.0, 7.0, 1.5),
        # z = 1/2, h = tanh(1/2 * ln 3) = 1/2: 2/2 + 1/4.
        ({"W_g": 0.5}, 2.0, LN3, 1.25),
        # r = 1/2, so h = tanh(1/2 * ln 3) = 1/2 and z = 1/2: ln 3 / 2 + 1/4.
        ({"U_g": 1.0}, LN3, 5.0, LN3 / 2 + 0.25),
        # r = sigmoid(ln 3) = 3/4, h = tanh(3/4 * 4/3 * ln 3) = 4/5, z = 1/2: ln 3 / 2 + 2/5.
        ({"W_r": 1.0, "U_g": 4 / 3}, LN3, LN3, LN3 / 2 + 0.4),
        # r = sigmoid(-ln 3) = 1/4, h = tanh(1/4 * 4 * ln 3) = 4/5, z = 1/2.
        ({"U_r": -1.0, "U_g": 4.0}, LN3, 5.0, LN3 / 2 + 0.4),
        # z = sigmoid(2 ln 3 - ln 3) = 3/4, h = tanh(ln 3) = 4/5: 1/4 * 1 + 3/4 * 4/5.
        ({"W_z": 2.0, "W_g": 1.0, "b_g": LN3}, 1.0, LN3, 0.85),
        # z = sigmoid(ln 3) = 3/4, h = 0: 1/4 * ln 3.
        ({"U_z": 1.0}, LN3, 5.0, LN3 / 4),
    ],
)
def test_gate_by_hand(weights, x, y, expected):
    found = gate_of(**weights)(torch.tensor([x]).double(), torch.tensor([y]).double())
    torch.testing.assert_close(found, torch.tensor([expected]).double(), rtol=0, atol=1e-6)


def test_the_bias_of_the_gates_sets_how_near_the_identity_it_begins():
    x, is_init = torch.randn(4, 30, 8), torch.zeros(4, 30, dtype=torch.bool)
    deviations = []
    for gate_bias in (0.0, 2.0, 30.0):
        torch.manual_seed(0)
        trunk = GTrXL(8, d_model=16, memory=8, gate_bias=gate_bias)
        y, _ = trunk(x, trunk.initial_state(4), is_init)
        features = trunk.embed(x)
        deviations.append(((y - features).norm() / features.norm()).item())
    ungated, by_default, shut = deviations
    assert by_default < 0.5 * ungated
    assert shut < 1e-6


@pytest.mark.parametrize("gate_bias", [math.nan, math.inf])
def test_a_bias_that_is_no_number_is_refused(gate_bias):
    with pytest.raises(ValueError, match="gate_bias must be a finite number, not"):
        GTrXL(4, d_model=8, gate_bias=gate_bias)
