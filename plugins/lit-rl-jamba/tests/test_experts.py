"""The mixture of experts against a loop over all of them; its load-balance loss against numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from lit_rl_jamba.experts import Experts, SwiGLU, measure_load, mixture, route

torch.set_num_threads(1)


def dense_mixture(x_ND, logits_NE, top_k, gate_up_EGD, down_EDH):
    """Every expert on every token, weighted by a softmax that is zero but for the k largest logits."""
    smallest_N1 = logits_NE.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
    weight_NE = logits_NE.masked_fill(logits_NE < smallest_N1, -torch.inf).softmax(dim=-1)
    if top_k == 1:
        weight_NE = weight_NE * logits_NE.softmax(dim=-1)
    y_ND = torch.zeros_like(x_ND)
    for expert, (gate_up_GD, down_DH) in enumerate(zip(gate_up_EGD, down_EDH, strict=True)):
        gate_GD, up_GD = gate_up_GD.chunk(2)
        hidden_NH = F.silu(x_ND @ gate_GD.T) * (x_ND @ up_GD.T)
        y_ND = y_ND + weight_NE[:, expert : expert + 1] * (hidden_NH @ down_DH.T)
    return y_ND


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 2), (8, 2), (3, 3), (5, 1), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_equals_a_loop_over_all_experts(n_experts, top_k, tokens):
    torch.manual_seed(0)
    layer = Experts(6, 5, n_experts=n_experts, top_k=top_k).double()
    x_ND = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x_ND, *layer.parameters()]
    found_ND = layer(x_ND[None])[0][0]
    expected_ND = dense_mixture(x_ND, x_ND @ layer.router.T, top_k, layer.gate_up, layer.down)
    torch.testing.assert_close(found_ND, expected_ND, rtol=0, atol=1e-10)
    weight_ND = torch.randn_like(found_ND)
    found = torch.autograd.grad((found_ND * weight_ND).sum(), inputs)
    expected = torch.autograd.grad((expected_ND * weight_ND).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_comparison_can_fail():
    """The k-th expert left out is found."""
    torch.manual_seed(0)
    layer = Experts(6, 5, n_experts=4, top_k=2).double()
    x_ND = torch.randn(9, 6, dtype=torch.float64)
    logits_NE = x_ND @ layer.router.T
    found_ND = mixture(x_ND, *route(logits_NE, 1), layer.gate_up, layer.down)
    expected_ND = dense_mixture(x_ND, logits_NE, 2, layer.gate_up, layer.down)
    assert (found_ND - expected_ND).abs().max() > 1e-3


def test_one_expert_of_one_is_the_plain_mlp():
    torch.manual_seed(0)
    experts, mlp = Experts(6, 5, n_experts=1, top_k=1), SwiGLU(6, 5)
    mlp.load_state_dict({"gate_up.weight": experts.gate_up[0], "down.weight": experts.down[0]})
    x_BTD = torch.randn(2, 7, 6)
    torch.testing.assert_close(experts(x_BTD)[0], mlp(x_BTD)[0])
    assert mlp(x_BTD)[1] is None


def test_what_a_token_gets_depends_on_itself_alone():
    """No capacity: however many tokens want one expert, all get it."""
    torch.manual_seed(0)
    layer = Experts(6, 5, n_experts=4, top_k=2)
    x_BTD = torch.randn(1, 1, 6)
    alone = layer(x_BTD)[0]
    torch.testing.assert_close(layer(x_BTD.expand(3, 50, 6))[0], alone.expand(3, 50, 6))


def test_route_by_hand():
    logits_NE = torch.tensor([[0.0, math.log(3), -5.0, math.log(6)]])
    weight_Nk, expert_Nk = route(logits_NE, 2)
    torch.testing.assert_close(weight_Nk, torch.tensor([[2 / 3, 1 / 3]]))
    assert expert_Nk.tolist() == [[3, 1]]
    weight_Nk, expert_Nk = route(torch.tensor([[0.0, math.log(3)]]), 1)
    torch.testing.assert_close(weight_Nk, torch.tensor([[3 / 4]]))
    assert expert_Nk.tolist() == [[1]]


def test_balance_of_even_routing_is_1():
    logits_NE = torch.zeros(6, 3)
    for expert_Nk in (torch.tensor([[0], [1], [2]] * 2), torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)):
        load = measure_load(logits_NE, expert_Nk)
        torch.testing.assert_close(load.balance, torch.tensor(1.0))
        torch.testing.assert_close(load.usage_E, torch.full((3,), 1 / 3))


def test_balance_of_all_tokens_on_one_expert_is_E():
    logits_NE = torch.tensor([[50.0, 0, 0, 0]] * 5)
    load = measure_load(logits_NE, route(logits_NE, 1)[1])
    torch.testing.assert_close(load.balance, torch.tensor(4.0))
    torch.testing.assert_close(load.usage_E, torch.tensor([1.0, 0, 0, 0]))
    logits_NE = torch.tensor([[50.0, 50.0, 0, 0]] * 5)  # on the same two: E / k
    torch.testing.assert_close(measure_load(logits_NE, route(logits_NE, 2)[1]).balance, torch.tensor(2.0))


def test_balance_by_hand():
    # P = (0.6, 0.25, 0.15); with k = 2 the assignments are 0, 1, 0, 2, so f = (1/2, 1/4, 1/4).
    logits_NE = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.2, 0.2 + 1e-7]]).log()
    load = measure_load(logits_NE, route(logits_NE, 2)[1])
    torch.testing.assert_close(load.usage_E, torch.tensor([0.5, 0.25, 0.25]))
    torch.testing.assert_close(load.balance, torch.tensor(3 * (0.6 / 2 + 0.25 / 4 + 0.15 / 4)))


def test_learning_the_balance_loss_evens_the_load():
    torch.manual_seed(0)
    layer = Experts(6, 5, n_experts=4, top_k=2)
    with torch.no_grad():
        layer.router[:, 0] += torch.tensor([2.0, 1.0, -1.0, -2.0])
    x_BTD = torch.randn(4, 32, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0])
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    start = layer(x_BTD)[1].usage_E
    for _ in range(60):
        optimizer.zero_grad()
        layer(x_BTD)[1].balance.backward()
        optimizer.step()
    end = layer(x_BTD)[1].usage_E
    assert start.max() > 0.4
    assert end.max() < 0.3
    torch.testing.assert_close(end.sum(), torch.tensor(1.0))


def test_load_is_measured_only_where_it_can_be_learned_from():
    layer = Experts(6, 5, n_experts=4, top_k=2)
    x_BTD = torch.randn(2, 3, 6)
    assert layer(x_BTD)[1].balance.requires_grad
    with torch.no_grad():
        assert layer(x_BTD)[1] is None
    assert layer.eval()(x_BTD)[1] is None


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_beyond_the_experts_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k must be from 1 to the number of experts, 4, not {top_k}"):
        Experts(6, 5, n_experts=4, top_k=top_k)
