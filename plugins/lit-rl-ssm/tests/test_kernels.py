"""Optional CUDA kernels: how they are found, and what Mamba and Mamba-2 give them, on the CPU with stand-ins.

Shapes: B rows, T time steps, H heads, P = headdim, N = d_state; D channels, W taps, S = W - 1 + T.
"""

import sys
import types
import warnings

import pytest
import torch
from lit_rl_ssm import cuda_scan, kernels
from lit_rl_ssm.kernels import CAUSAL_CONVOLUTION, CHUNK_SCAN, SELECTIVE_SCAN, Kernel
from lit_rl_ssm.mamba import Mamba
from lit_rl_ssm.mamba2 import Mamba2

from lit_rl.testing.trunk_checks import contract
from lit_rl.testing.trunk_checks.platforms import agrees_with_cpu
from lit_rl.testing.trunk_checks.runs import Subject

torch.set_num_threads(1)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    """What the published kernel means: states pass between steps of one seq_idx, which begins with 0."""
    rows, steps, heads, headdim = x.shape
    d_state = B.shape[-1]
    assert dt.shape == (rows, steps, heads)
    assert A.shape == D.shape == (heads,)
    assert B.shape == C.shape == (rows, steps, 1, d_state)
    assert initial_states.shape == (rows, heads, headdim, d_state)
    assert seq_idx.shape == (rows, steps)
    assert seq_idx.dtype == torch.int32
    assert chunk_size & (chunk_size - 1) == 0
    assert z is None
    assert dt_bias is None
    assert cu_seqlens is None
    assert not dt_softplus
    assert dt_limit == (0.0, float("inf"))
    assert not return_varlen_states
    h, outputs = initial_states, []
    before = torch.zeros_like(seq_idx[:, 0])
    for t in range(steps):
        h = torch.where((seq_idx[:, t] == before)[:, None, None, None], h, 0.0)
        before = seq_idx[:, t]
        h = h * torch.exp(dt[:, t] * A)[:, :, None, None]
        h = h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    out = torch.stack(outputs, dim=1)
    return (out, h) if return_final_states else out


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """What the published kernel means: a tap sees zero where the seq_idx of its input is another one."""
    steps = x.shape[2]
    assert x.stride(1) == 1
    assert x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert initial_states is None
    assert not return_final_states
    assert final_states_out is None
    assert activation is None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
    outputs = []
    for t in range(steps):
        out = bias
        for tap in range(weight.shape[1]):
            s = t - weight.shape[1] + 1 + tap
            if s >= 0:
                seen = x[:, :, s]
                if seq_idx is not None:
                    seen = torch.where((seq_idx[:, s] == seq_idx[:, t])[:, None], seen, 0.0)
                out = out + seen * weight[:, tap]
        outputs.append(out)
    return torch.stack(outputs, dim=2)


def selective_scan_fn(u, delta, A, B, C):
    """What the published kernel means: channels first, no resets, from zero."""
    h, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(dim=-1))
    return torch.stack(outputs, dim=2)


RUNS_ON = kernels.runs_on


@pytest.fixture
def stand_ins(monkeypatch):
    """Both packages, as far as the Mambas ask for them, on a machine that seems to run them."""
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    for kernel, function in (
        (CHUNK_SCAN, mamba_chunk_scan_combined),
        (SELECTIVE_SCAN, selective_scan_fn),
        (CAUSAL_CONVOLUTION, causal_conv1d_fn),
    ):
        parts = kernel.module.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            module = types.ModuleType(name)
            module.__path__ = []
            module.__spec__ = types.SimpleNamespace(name=name)
            monkeypatch.setitem(sys.modules, name, module)
        setattr(module, kernel.name, counted(function))
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "runs_on", lambda x: True)
    monkeypatch.setattr(cuda_scan, "runs_on", lambda x: kernels.runs_on(x))
    Kernel.find.cache_clear()
    yield calls
    Kernel.find.cache_clear()


def test_mamba2_by_kernels_is_mamba2(stand_ins, monkeypatch):
    """Values, states and gradients in every situation of the kit; the same check fails without `seq_idx`."""
    subject = Subject(Mamba2, {"d_model": 8, "headdim": 4, "d_state": 4})
    for check in (
        contract.check_values_agree,
        contract.check_gradients_agree,
        contract.check_reset_starts_afresh,
        contract.check_no_leak_between_episodes,
    ):
        check(subject)
    assert {"mamba_chunk_scan_combined", "causal_conv1d_fn"} == set(stand_ins)
    monkeypatch.setattr(kernels, "episode_numbers", torch.zeros_like)
    with pytest.raises(AssertionError):
        contract.check_reset_starts_afresh(subject)


def test_mamba_by_kernels_is_mamba(stand_ins):
    subject = Subject(Mamba, {"d_model": 8, "d_state": 4, "backend": "cuda"})
    for check in (
        contract.check_values_agree,
        contract.check_gradients_agree,
        contract.check_reset_starts_afresh,
        contract.check_no_leak_between_episodes,
    ):
        check(subject)
    assert {"selective_scan_fn", "causal_conv1d_fn"} == set(stand_ins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("trunk_class", [Mamba, Mamba2])
def test_backend_cuda_goes_the_torch_way_where_kernels_cannot(stand_ins, monkeypatch, trunk_class, dtype):
    """On the CPU, as the references of checks on a GPU do."""
    monkeypatch.setattr(kernels, "runs_on", RUNS_ON)
    by_torch = trunk_class(5, d_model=16, backend="torch").to(dtype)
    by_kernel = trunk_class(5, d_model=16, backend="cuda").to(dtype)
    by_kernel.load_state_dict(by_torch.state_dict())
    given = torch.randn(2, 9, 5, dtype=dtype), by_torch.initial_state(2), torch.rand(2, 9) < 0.2
    torch.testing.assert_close(by_kernel(*given)[0], by_torch(*given)[0], rtol=0, atol=0)
    assert not stand_ins


@pytest.mark.parametrize("trunk_class", [Mamba, Mamba2])
def test_kernels_in_float32_stand_beside_a_reference_in_float64_of_the_same_options(
    stand_ins, monkeypatch, trunk_class
):
    """The comparison that a check on a GPU makes."""
    monkeypatch.setattr(kernels, "runs_on", lambda x: x.dtype != torch.float64)
    agrees_with_cpu(Subject(trunk_class, {"d_model": 16, "d_state": 4, "backend": "cuda"}), "cpu")
    assert len(set(stand_ins)) == 2


@pytest.mark.parametrize(
    ("backend", "steps", "taken"), [("auto", 9, 2), ("cuda", 9, 2), ("torch", 9, 0), ("cuda", 1, 0)]
)
def test_which_passes_take_kernels(stand_ins, backend, steps, taken):
    trunk = Mamba2(5, backend=backend)
    trunk(torch.randn(2, steps, 5), trunk.initial_state(2), torch.zeros(2, steps, dtype=torch.bool))
    assert len(stand_ins) == taken


def test_kernels_multiply_float32_as_float32_unless_told_otherwise(stand_ins, monkeypatch):
    import os

    CHUNK_SCAN.require()
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    CHUNK_SCAN.require()
    assert os.environ["TRITON_F32_DEFAULT"] == "tf32"


def test_the_other_kernel_is_used_where_one_is_missing(stand_ins, monkeypatch):
    monkeypatch.delitem(sys.modules, "causal_conv1d")
    trunk = Mamba2(5)
    trunk(torch.randn(2, 9, 5), trunk.initial_state(2), torch.zeros(2, 9, dtype=torch.bool))
    assert set(stand_ins) == {"mamba_chunk_scan_combined"}


def test_backend_cuda_without_the_package_is_one_line():
    missing = Kernel("no_such_package.ops", "scan")
    with pytest.raises(ImportError) as error:
        kernels.kernel_for(missing, "cuda")
    assert str(error.value) == (
        "scan needs the package no_such_package, not installed here: pip install 'lit-rl-ssm[cuda]'"
    )


def broken_package(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    return Kernel("broken_package", "scan")


def test_backend_cuda_without_a_device_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="scan needs a CUDA device") as error:
        kernels.kernel_for(broken_package(tmp_path, monkeypatch), "cuda")
    assert "\n" not in str(error.value)


def test_a_broken_package_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ImportError, match=r"does not import \(No module named 'no_such_library'\)"):
        kernels.kernel_for(broken_package(tmp_path, monkeypatch), "cuda")


def test_auto_warns_of_a_broken_package_once_and_goes_on(tmp_path, monkeypatch):
    broken = broken_package(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(RuntimeWarning, match="No module named 'no_such_library'"):
        assert kernels.kernel_for(broken, "auto") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.kernel_for(broken, "auto") is None


def test_auto_is_silent_without_the_package_or_a_gpu(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert kernels.kernel_for(broken_package(tmp_path, monkeypatch), "auto") is None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert kernels.kernel_for(Kernel("no_such_package.ops", "scan"), "auto") is None
