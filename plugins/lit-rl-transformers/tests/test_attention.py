"""`WindowAttention` keeps the contract of a trunk and equals attention written as a loop over steps."""

import pytest
import torch
from lit_rl_transformers.attention import WindowAttention
from tensordict import TensorDict

from lit_rl.testing import TrunkConformance
from lit_rl.testing.trunk_checks.platforms import check_compile
from lit_rl.trunks import Trunk

torch.set_num_threads(1)


class Alone(Trunk):
    """One mixer as a trunk, for the conformance kit."""

    def __init__(self, in_features: int, *, d_model: int = 8, n_heads: int = 2, memory: int = 3) -> None:
        super().__init__(in_features, d_model)
        self.embed = torch.nn.Linear(in_features, d_model)
        self.mixer = WindowAttention(d_model, n_heads=n_heads, memory=memory)

    def initial_state(self, batch_size):
        return TensorDict(self.mixer.initial_state(batch_size), batch_size=[batch_size])

    def forward(self, x, state, is_init):
        y, state = self.mixer(self.embed(x), dict(state.items()), is_init)
        return y, TensorDict(state, batch_size=[x.shape[0]])


class TestWindowAttention(TrunkConformance):
    trunk = Alone
    options = ({},)

    def test_conformance(self, subject, check):
        if check is check_compile:
            pytest.skip("compiled as part of the trunks")
        check(subject)


def pass_in_flight(
    memory: int, steps: int, rows: int = 3
) -> tuple[WindowAttention, torch.Tensor, dict, torch.Tensor]:
    """A mixer in float64 with features, a state in the midst of episodes and random resets."""
    torch.manual_seed(memory + steps)
    mixer = WindowAttention(8, n_heads=2, memory=memory).double()
    with torch.no_grad():
        before = torch.randn(rows, 9, 8).double()
        _, state = mixer(before, mixer.initial_state(rows), torch.rand(rows, 9) < 0.2)
    return mixer, torch.randn(rows, steps, 8).double(), state, torch.rand(rows, steps) < 0.05


def loop(mixer: WindowAttention, x_BTD, state, is_init_BT):
    """The same output, one query, one head and one key at a time."""
    H, D, M = mixer.n_heads, mixer.d_model, mixer.memory
    C = D // H
    rows = []
    for b in range(x_BTD.shape[0]):
        held = min(int(state["age"][b]), M)
        keys = [slot[:D] for slot in state["kv"][b, M - held :]]
        values = [slot[D:] for slot in state["kv"][b, M - held :]]
        for t in range(x_BTD.shape[1]):
            q, k, v = (mixer.qkv.weight @ x_BTD[b, t]).split(D)
            if is_init_BT[b, t]:
                keys, values = [], []
            keys, values = [*keys, k][-M - 1 :], [*values, v][-M - 1 :]
            heads = []
            for h in range(H):
                part = slice(h * C, (h + 1) * C)
                scores = torch.stack([q[part] @ key[part] / C**0.5 for key in keys])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
            rows.append(mixer.out.weight @ torch.cat(heads))
    return torch.stack(rows).view_as(x_BTD)


@pytest.mark.parametrize(
    ("memory", "steps"), [(1, 1), (3, 1), (3, 40), (5, 64), (20, 40), (20, 41), (60, 50)]
)
def test_equals_the_loop_in_values_and_gradients(memory, steps):
    mixer, x, state, is_init = pass_in_flight(memory, steps)
    wanted = [x.requires_grad_(), state["kv"].requires_grad_(), *mixer.parameters()]
    found, _ = mixer(x, state, is_init)
    expected = loop(mixer, x, state, is_init)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted, materialize_grads=True, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 9, 70])
def test_slots_that_hold_nothing_are_never_read(steps):
    mixer, x, state, is_init = pass_in_flight(20, steps)
    is_empty = torch.arange(20) < 20 - state["age"][:, None]
    assert is_empty.any()
    spoiled = {
        "kv": state["kv"].masked_fill(is_empty[..., None], torch.nan).requires_grad_(),
        "age": state["age"],
    }
    y, after = mixer(x, state, is_init)
    y_spoiled, after_spoiled = mixer(x, spoiled, is_init)
    assert y.equal(y_spoiled)
    assert after["kv"].equal(after_spoiled["kv"])
    gradient = torch.autograd.grad(y_spoiled.sum() + after_spoiled["kv"].sum(), spoiled["kv"])[0]
    assert not gradient[is_empty].any()


@pytest.mark.parametrize(("memory", "steps", "queries"), [(20, 9, 1), (3, 9, 2), (20, 30, 30), (3, 60, 40)])
def test_where_the_last_steps_ask_alone(memory, steps, queries):
    mixer, x, state, is_init = pass_in_flight(memory, steps)
    is_empty = torch.arange(memory) < memory - state["age"][:, None]
    cache = state["kv"].masked_fill(is_empty[..., None], torch.nan)
    y, after = mixer(x, state, is_init)
    window = mixer.window(state["age"], is_init, queries)
    y_alone, slots = mixer.attend(x, cache, window)
    torch.testing.assert_close(y_alone, y[:, -queries:], rtol=0, atol=1e-12)
    torch.testing.assert_close(window.cache_after(slots), after["kv"], rtol=0, atol=1e-12)


def test_memory_ends_at_the_window():
    mixer, x, state, _ = pass_in_flight(4, 30)
    is_init = torch.zeros(3, 30, dtype=torch.bool)
    y, _ = mixer(x.requires_grad_(), state, is_init)
    gradient = torch.autograd.grad(y[:, 20].sum(), x)[0].abs().sum(dim=(0, 2))
    assert gradient.nonzero().flatten().tolist() == [16, 17, 18, 19, 20]


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_map_gives_the_output_from_the_initial_state(steps):
    mixer, x, _, is_init = pass_in_flight(6, steps)
    mixer = WindowAttention(8, n_heads=1, memory=6).double()
    state = mixer.initial_state(3)
    weights_BTT = mixer.attention_map(x, state, is_init)
    torch.testing.assert_close(weights_BTT.sum(dim=2), torch.ones(3, steps).double())
    episode_BT = is_init.cumsum(dim=1)
    step = torch.arange(steps)
    distance_TT = step[:, None] - step
    is_hidden = (distance_TT < 0) | (distance_TT > 6) | (episode_BT[:, :, None] != episode_BT[:, None, :])
    assert not weights_BTT[is_hidden].any()
    assert (weights_BTT[~is_hidden] > 0).all()
    values = mixer.qkv(x)[..., 16:]
    torch.testing.assert_close(
        mixer.out(weights_BTT @ values), mixer(x, state, is_init)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 10, "n_heads": 4}, "d_model = 10 does not split into n_heads = 4"),
        ({"d_model": 8, "n_heads": 0}, "n_heads must be at least 1, not 0"),
        ({"d_model": 8, "memory": 0}, "memory must be at least 1, not 0"),
    ],
)
def test_bad_sizes_are_one_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        WindowAttention(options.pop("d_model"), **options)
    assert "\n" not in str(caught.value)
