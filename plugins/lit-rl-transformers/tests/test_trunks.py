"""What holds for all trunks beside the contract: reach, positions, long passes, maps and bad options."""

import pytest
import torch
from lit_rl_transformers.attention import WindowAttention
from lit_rl_transformers.gtrxl import GTrXL
from lit_rl_transformers.transformer import Transformer
from lit_rl_transformers.transformer_xl import TransformerXL

torch.set_num_threads(1)

every_trunk = pytest.mark.parametrize("trunk_class", [Transformer, TransformerXL, GTrXL])


def never(rows: int, steps: int) -> torch.Tensor:
    return torch.zeros(rows, steps, dtype=torch.bool)


@every_trunk
@pytest.mark.parametrize("chunks", [[30], [16, 14], [1] * 30])
def test_memory_ends_at_the_window_of_all_layers(trunk_class, chunks):
    torch.manual_seed(0)
    trunk = trunk_class(4, d_model=8, n_layers=2, n_heads=2, memory=3)
    x = torch.randn(2, 30, 4, requires_grad=True)
    state, outputs = trunk.initial_state(2), []
    for part in x.split(chunks, dim=1):
        y, state = trunk(part, state, never(2, part.shape[1]))
        outputs.append(y)
    weight = torch.randn(2, 8)  # not a plain sum: it is constant after a LayerNorm
    gradient = torch.autograd.grad((torch.cat(outputs, dim=1)[:, 20] * weight).sum(), x)[0]
    reached = gradient.abs().sum(dim=(0, 2)).nonzero().flatten().tolist()
    assert reached == list(range(14, 21))  # 2 layers of 3 steps each, and the step itself


@every_trunk
def test_order_of_earlier_steps_matters(trunk_class):
    torch.manual_seed(0)
    trunk = trunk_class(8, d_model=8, n_layers=1, n_heads=2, memory=6).double()
    x = torch.randn(1, 5, 8).double()
    swapped = x[:, [1, 0, 2, 3, 4]]
    state = trunk.initial_state(1)
    y, _ = trunk(x, state, never(1, 5))
    y_swapped, _ = trunk(swapped, state, never(1, 5))
    assert (y[:, -1] - y_swapped[:, -1]).abs().max() > 1e-6  # GTrXL begins near the identity

    mixer = WindowAttention(8, n_heads=2, memory=6).double()  # knows no positions
    y, _ = mixer(x, mixer.initial_state(1), never(1, 5))
    y_swapped, _ = mixer(swapped, mixer.initial_state(1), never(1, 5))
    torch.testing.assert_close(y[:, -1], y_swapped[:, -1], rtol=0, atol=1e-12)


@every_trunk
def test_only_distances_matter_however_old_the_episode(trunk_class):
    torch.manual_seed(0)
    trunk = trunk_class(4, d_model=16, n_layers=1, n_heads=2, memory=4)
    young, old = trunk.initial_state(2), trunk.initial_state(2)
    old["age"] += 1_000_003
    x = torch.randn(2, 10, 4)
    # The last step sees four others of this pass, so nothing of the caches.
    y_young, y_old = (trunk(x, state, never(2, 10))[0][:, -1] for state in (young, old))
    torch.testing.assert_close(y_young, y_old, rtol=0, atol=1e-5)


@every_trunk
def test_a_long_pass_equals_chunks(trunk_class):
    torch.manual_seed(0)
    trunk = trunk_class(4, d_model=8, n_layers=2, n_heads=2, memory=20).double()
    x, is_init = torch.randn(2, 1024, 4).double(), torch.rand(2, 1024) < 0.01
    weight = torch.randn(2, 1024, 8).double()
    results = {}
    for size in (1024, 130, 16):
        trunk.zero_grad()
        state, total = trunk.initial_state(2), 0.0
        parts = zip(x.split(size, 1), is_init.split(size, 1), weight.split(size, 1), strict=True)
        for part, resets, weights in parts:
            y, state = trunk(part, state, resets)
            total = total + (y * weights).sum()
        total.backward()
        results[size] = [total.detach(), *(p.grad.clone() for p in trunk.parameters())]
    for size in (130, 16):
        for chunked, whole in zip(results[size], results[1024], strict=True):
            torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-9)


@every_trunk
def test_a_long_pass_equals_single_steps(trunk_class):
    torch.manual_seed(0)
    trunk = trunk_class(4, d_model=8, n_layers=2, n_heads=2, memory=20).double()
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


@every_trunk
@pytest.mark.parametrize(("memory", "steps", "last"), [(3, 60, 40), (20, 60, 50), (40, 30, 1), (4, 9, 9)])
def test_the_last_steps_alone(trunk_class, memory, steps, last):
    torch.manual_seed(0)
    trunk = trunk_class(4, d_model=8, n_layers=2, n_heads=2, memory=memory).double()
    with torch.no_grad():
        _, state = trunk(torch.randn(3, 50, 4).double(), trunk.initial_state(3), never(3, 50))
    for key in trunk.cache_keys:
        state[key].requires_grad_()
    is_init = never(3, steps)
    is_init[0, 2] = is_init[1, -1] = True
    x = torch.randn(3, steps, 4).double().requires_grad_()
    wanted = [x, *(state[key] for key in trunk.cache_keys), *trunk.parameters()]
    weight = torch.randn(3, last, 8).double()

    expected = trunk(x, state, is_init)[0][:, -last:]
    seen = []
    trunk.layers[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    found = trunk.last_steps(x, state, is_init, last)
    assert seen == [last]  # the last layer's MLP has no other steps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@every_trunk
@pytest.mark.parametrize(("memory", "steps"), [(5, 1), (5, 13), (5, 64), (40, 30)])
def test_attention_maps(trunk_class, memory, steps):
    torch.manual_seed(0)
    trunk = trunk_class(4, d_model=8, n_layers=2, n_heads=1, memory=memory).double()
    x, is_init = torch.randn(3, steps, 4).double(), torch.rand(3, steps) < 0.1
    state = trunk.initial_state(3)
    maps = trunk.attention_maps(x, state, is_init)
    assert [list(weights.shape) for weights in maps] == [[3, steps, steps]] * 2
    step, episode_BT = torch.arange(steps), is_init.cumsum(dim=1)
    distance_TT = step[:, None] - step
    is_hidden = (distance_TT < 0) | (distance_TT > memory) | (episode_BT[:, :, None] != episode_BT[:, None])
    for weights_BTT in maps:
        torch.testing.assert_close(weights_BTT.sum(dim=2), torch.ones(3, steps).double())
        assert not weights_BTT[is_hidden].any()
        assert (weights_BTT[~is_hidden] > 0).all()

    # The first layer's weights bring its values to its output.
    layer = trunk.layers[0]
    normed = layer.attention_norm(trunk.embed(x))
    window = layer.attention.window(state["age"], is_init)
    y, _ = layer.attention.attend(normed, state["kv_0"], window)
    values = layer.attention.qkv(normed)[..., 16:]
    torch.testing.assert_close(layer.attention.out(maps[0] @ values), y, rtol=0, atol=1e-12)


@every_trunk
def test_weights_on_the_cache_are_left_out_of_the_maps(trunk_class):
    torch.manual_seed(0)
    trunk = trunk_class(4, d_model=8, n_layers=1, n_heads=2, memory=3)
    _, state = trunk(torch.randn(1, 9, 4), trunk.initial_state(1), never(1, 9))
    sums = trunk.attention_maps(torch.randn(1, 5, 4), state, never(1, 5))[0].sum(dim=2)[0]
    assert (sums[:3] < 0.999).all()
    torch.testing.assert_close(sums[3:], torch.ones(2))


@every_trunk
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 10, "n_heads": 4}, "d_model = 10 does not split into n_heads = 4 equal heads"),
        ({"d_model": 0}, "d_model must be at least 1, not 0"),
        ({"n_layers": 0}, "n_layers must be at least 1"),
        ({"n_heads": -1}, "n_heads must be at least 1, not -1"),
        ({"memory": 0}, "memory must be at least 1, not 0"),
        ({"d_ff": 0}, "d_ff must be at least 1, not 0"),
    ],
)
def test_bad_options_are_one_line(trunk_class, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        trunk_class(4, **options)
    assert "\n" not in str(caught.value)


def test_heads_of_odd_width_cannot_be_rotated():
    with pytest.raises(ValueError, match=r"heads of odd width \(12 / 4 = 3\)"):
        Transformer(4, d_model=12, n_heads=4)


@every_trunk
@pytest.mark.parametrize("options", [{"memory": 6}, {"d_model": 16}, {"n_layers": 1}, {"n_layers": 3}])
def test_a_state_of_other_options_is_refused_in_one_line(trunk_class, options):
    own = {"d_model": 8, "n_layers": 2, "memory": 5}
    trunk, other = trunk_class(4, **own), trunk_class(4, **(own | options))
    with pytest.raises(ValueError, match=r"the state given has .*, \w+ keeps") as caught:
        trunk(torch.randn(2, 3, 4), other.initial_state(2), never(2, 3))
    assert "\n" not in str(caught.value)


@every_trunk
@pytest.mark.parametrize("rows", [1, 3])
def test_a_state_of_another_number_of_rows_is_refused(trunk_class, rows):
    trunk = trunk_class(4, d_model=8, n_layers=2, memory=5)
    with pytest.raises(ValueError, match=rf"has 'kv_0' \[{rows}, 5, 16\], \w+ keeps 'kv_0' \[2, 5, 16\]"):
        trunk(torch.randn(2, 3, 4), trunk.initial_state(rows), never(2, 3))
