"""Every way through the selective scan gives the recurrence of the paper, step by step, and its gradients."""

import pytest
import torch
from lit_rl_ssm import compiled_scan as compiled
from lit_rl_ssm.compiled_scan import compiled_scan
from lit_rl_ssm.cuda_scan import scan_with
from lit_rl_ssm.selective_scan import automatic_scan, hidden_attention, scan_by, selective_scan
from lit_rl_ssm.torch_scan import torch_scan
from torch import Tensor

torch.set_num_threads(1)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
NAMES = ("y", "h", "u'", "dt'", "A'", "B'", "C'", "h'")


def literal(u, dt, A, B, C, h, is_init):
    """Gu & Dao 2023, read off the page: one step after the other."""
    outputs = []
    for t in range(u.shape[1]):
        h = h * ~is_init[:, t, None, None]
        h = torch.exp(dt[:, t, :, None] * A) * h + dt[:, t, :, None] * B[:, t, None] * u[:, t, :, None]
        outputs.append(torch.einsum("ben,bn->be", h, C[:, t]))
    return torch.stack(outputs, dim=1), h


def kernel_stand_in(u, delta, A, B, C):
    """What mamba_ssm's `selective_scan_fn` makes of these: channels first, no resets, from zero."""
    h, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(dim=-1))
    return torch.stack(outputs, dim=2)


def on_stand_in(*inputs):
    return scan_with(kernel_stand_in, *inputs)


def by_steps(scan):
    def run(u, dt, A, B, C, h, is_init):
        outputs = []
        for t in range(u.shape[1]):
            now = slice(t, t + 1)
            y, h = scan(u[:, now], dt[:, now], A, B[:, now], C[:, now], h, is_init[:, now])
            outputs.append(y)
        return torch.cat(outputs, dim=1), h

    return run


def in_chunks(u, dt, A, B, C, h, is_init):
    outputs = []
    for now in torch.arange(u.shape[1]).split([1, 7, 17, 8] if u.shape[1] == 33 else 7):
        y, h = compiled_scan(u[:, now], dt[:, now], A, B[:, now], C[:, now], h, is_init[:, now])
        outputs.append(y)
    return torch.cat(outputs, dim=1), h


SCANS = {
    "compiled": compiled_scan,
    "compiled by steps": by_steps(compiled_scan),
    "compiled in chunks": in_chunks,
    "torch": torch_scan,
    "torch by steps": by_steps(torch_scan),
    "stock kernel": on_stand_in,
}


def inputs(steps: int, resets: float, dtype: torch.dtype, rows=3, channels=6, d_state=5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(steps)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [
        normal(rows, steps, channels),
        normal(rows, steps, channels).sub(3).exp(),
        -normal(channels, d_state).exp(),
        normal(rows, steps, d_state),
        normal(rows, steps, d_state),
        normal(rows, channels, d_state),
    ]
    is_init = torch.rand(rows, steps, generator=generator) < resets
    return [tensor.to(dtype).requires_grad_() for tensor in tensors] + [is_init]


def values_and_gradients(scan, given: list[Tensor]) -> list[Tensor]:
    y, h = scan(*given)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in (y, h)
    )
    return [y.detach(), h.detach(), *torch.autograd.grad(total, given[:6])]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("steps", "resets"), [(1, 0.5), (16, 0), (33, 0.1), (40, 1)])
@pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
def test_scan_equals_the_literal_recurrence(scan, steps, resets, dtype):
    assert_equals_the_literal_recurrence(scan, inputs(steps, resets, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scan", [compiled_scan, torch_scan])
def test_long_scan_equals_the_literal_recurrence(scan, dtype):
    assert_equals_the_literal_recurrence(scan, inputs(1024, 0.02, dtype))


def assert_equals_the_literal_recurrence(scan, given):
    in_float64 = [tensor.detach().double().requires_grad_() for tensor in given[:6]] + [given[6]]
    expected = values_and_gradients(literal, in_float64)
    for name, found, exact in zip(NAMES, values_and_gradients(scan, given), expected, strict=True):
        assert found.dtype == given[0].dtype
        scale = max(1.0, exact.abs().max().item())
        torch.testing.assert_close(
            found.double(),
            exact,
            rtol=0,
            atol=TOLERANCE[found.dtype] * scale,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_resets_matter():
    given = inputs(33, 0.1, torch.float64)
    y, _ = compiled_scan(*given)
    leaky, _ = compiled_scan(*given[:6], torch.zeros_like(given[6]))
    assert (y - leaky).abs().max() > 0.1


@pytest.mark.parametrize("scan", [compiled_scan, torch_scan])
def test_what_is_given_stays_as_it_is(scan):
    given = inputs(20, 0.2, torch.float32)
    before = [tensor.detach().clone() for tensor in given]
    values_and_gradients(scan, given)
    for tensor, kept in zip(given, before, strict=True):
        torch.testing.assert_close(tensor.detach(), kept, rtol=0, atol=0)


class OnCuda(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda, is_cpu = True, False


@pytest.mark.parametrize(
    ("kernel", "place", "dtype", "taken"),
    [
        (None, Tensor, torch.float32, "compiled_scan"),
        (None, Tensor, torch.float64, "compiled_scan"),
        (None, OnCuda, torch.float32, "torch_scan"),
        (kernel_stand_in, Tensor, torch.float32, "compiled_scan"),
        (kernel_stand_in, OnCuda, torch.float32, "scan_with"),
        (kernel_stand_in, OnCuda, torch.float64, "torch_scan"),
    ],
)
def test_automatic_scan_takes_what_runs_there(monkeypatch, kernel, place, dtype, taken):
    for module, name in (
        ("selective_scan", "compiled_scan"),
        ("cuda_scan", "torch_scan"),
        ("cuda_scan", "scan_with"),
    ):
        monkeypatch.setattr(f"lit_rl_ssm.{module}.{name}", lambda *given, name=name: name)
    u, *others = inputs(2, 0, dtype)
    assert automatic_scan(kernel, u.detach().as_subclass(place), *others) == taken


def test_backend_auto_and_cuda_run_the_kernel_that_is_found(monkeypatch):
    monkeypatch.setattr("lit_rl_ssm.selective_scan.kernel_for", lambda kernel, backend: kernel_stand_in)
    given = inputs(9, 0.2, torch.float32)
    expected = torch_scan(*given)
    there = [given[0].detach().as_subclass(OnCuda), *given[1:]]
    for backend in ("auto", "cuda"):
        for found, exact in zip(scan_by(backend)(*there), expected, strict=True):
            assert isinstance(found, OnCuda)
            torch.testing.assert_close(found.as_subclass(Tensor), exact, rtol=0, atol=1e-5)


def test_a_reset_lengthens_the_step_of_each_channel_by_what_that_channel_needs():
    """A slow channel must not cost the others precision."""
    u, dt, A, *others, is_init = inputs(9, 0.3, torch.float32)
    A = A.detach().clone()
    A[0] *= 1e-4
    longest = []

    def kernel(u, delta, *maps):
        longest.append(delta.detach().amax(dim=(0, 2)))
        return kernel_stand_in(u, delta, *maps)

    scan_with(kernel, u, dt, A, *others, is_init)
    exponent_E = longest[0] * A.abs().amin(dim=1)
    needed_E = (dt.detach().amax(dim=(0, 1)) * A.abs().amin(dim=1)) + 104
    assert (exponent_E >= 104).all()
    assert (exponent_E <= needed_E * (1 + 1e-6)).all()


def test_a_step_size_of_zero_is_no_division_by_it():
    """Where softplus underflows."""
    given = inputs(9, 0.3, torch.float32)
    with torch.no_grad():
        given[1][:, ::2] = 0
    found, expected = (values_and_gradients(scan, given) for scan in (on_stand_in, torch_scan))
    for name, one, other in zip(NAMES, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_half_precision_is_scanned_in_float32(backend):
    given = inputs(200, 0.02, torch.bfloat16)
    wide = [tensor.detach().float() for tensor in given[:6]]
    y, h = selective_scan(*given, scan=scan_by(backend))
    exact_y, exact_h = torch_scan(*wide, given[6])
    torch.testing.assert_close(y, exact_y.bfloat16())
    torch.testing.assert_close(h, exact_h.bfloat16())


def test_autocast_does_not_round_the_scan():
    given = inputs(20, 0.2, torch.float32)
    exact = values_and_gradients(torch_scan, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = values_and_gradients(lambda *given: selective_scan(*given, scan=torch_scan), given)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_nan_in_a_parameter_shows_in_the_output():
    given = inputs(20, 0, torch.float32)
    with torch.no_grad():
        given[2][1, 2] = torch.nan
        y, _ = compiled_scan(*given)
    assert y[:, :, 1].isnan().all()
    assert not y[:, :, [0, 2, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("used", [0, 1], ids=["outputs alone", "last state alone"])
@pytest.mark.parametrize("scan", [compiled_scan, torch_scan])
def test_gradient_of_one_result_alone(scan, used):
    given = inputs(20, 0.1, torch.float64)
    expected = torch.autograd.grad(literal(*given)[used].sum(), given[:6], materialize_grads=True)
    found = torch.autograd.grad(scan(*given)[used].sum(), given[:6], materialize_grads=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("alone", range(6), ids=["u", "dt", "A", "B", "C", "h"])
def test_gradient_of_one_input_alone(alone):
    given = inputs(20, 0.1, torch.float64)
    expected = values_and_gradients(literal, given)[2 + alone]
    for place, tensor in enumerate(given[:6]):
        tensor.requires_grad_(place == alone)
    y, h = compiled_scan(*given)
    generator = torch.Generator().manual_seed(1)
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in (y, h))
    torch.testing.assert_close(torch.autograd.grad(total, given[alone])[0], expected)


def test_states_are_kept_for_a_gradient_only(monkeypatch):
    marks = []
    run = compiled._forward
    monkeypatch.setattr(
        compiled, "_forward", lambda *arrays: (marks.append(arrays[9].shape[1]), run(*arrays))
    )
    given = inputs(3 * compiled.CHUNK, 0, torch.float32)
    compiled_scan(*given)
    with torch.no_grad():
        compiled_scan(*given)
    compiled_scan(*(tensor.detach() for tensor in given))
    assert marks == [2, 0, 0]


def test_memory_kept_for_the_backward_pass_is_no_more_than_the_input():
    given = inputs(16 * compiled.CHUNK, 0, torch.float32)
    y, _ = compiled_scan(*given)
    d_state = given[2].shape[1]
    assert d_state < compiled.CHUNK
    assert max(kept.numel() for kept in y.grad_fn.saved_tensors) <= y.numel()


@pytest.mark.parametrize("resets", [0, 0.15, 1])
def test_hidden_attention_times_the_input_is_the_output_from_a_zero_state(resets):
    u, dt, A, B, C, h, is_init = inputs(30, resets, torch.float64)
    y, _ = literal(u, dt, A, B, C, torch.zeros_like(h), is_init)
    map_BETT = hidden_attention(dt, A, B, C, is_init)
    torch.testing.assert_close(torch.einsum("bets,bse->bte", map_BETT, u), y, rtol=0, atol=1e-10)
    torch.testing.assert_close(map_BETT, map_BETT.tril(), rtol=0, atol=0)


def test_hidden_attention_is_zero_across_resets_only():
    _, dt, A, B, C, _, is_init = inputs(30, 0.15, torch.float64)
    episode_BT = is_init.cumsum(dim=1)
    other_episode = episode_BT[:, :, None] != episode_BT[:, None, :]
    map_BETT = hidden_attention(dt, A, B, C, is_init)
    assert not map_BETT.masked_select(other_episode[:, None]).any()
    assert map_BETT.masked_select(~other_episode.triu()[:, None] & ~other_episode[:, None]).any()
    without = hidden_attention(dt, A, B, C, torch.zeros_like(is_init))
    assert without.masked_select(other_episode.tril()[:, None]).all()
