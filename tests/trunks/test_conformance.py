"""The built-in trunks keep the contract."""

import pytest

from lit_rl.testing import TrunkConformance
from lit_rl.trunks import GRU, LSTM, MLP, recurrent


class TestMLP(TrunkConformance):
    trunk = MLP
    options = ({}, {"d_model": 7, "n_layers": 1, "activation": "relu"}, {"activation": "gelu"})


class TestLSTM(TrunkConformance):
    trunk = LSTM
    options = ({}, {"d_model": 7, "n_layers": 3})


class TestGRU(TrunkConformance):
    trunk = GRU
    options = ({}, {"d_model": 7, "n_layers": 3})


class TorchKernels:
    """The way of other devices and types, on stretched rows."""

    @pytest.fixture(autouse=True)
    def do_not_compile(self, monkeypatch):
        monkeypatch.setattr(recurrent, "can_be_compiled", lambda *tensors: False)


class TestLSTMByTorchKernel(TorchKernels, TrunkConformance):
    trunk = LSTM
    options = ({"d_model": 7, "n_layers": 2},)


class TestGRUByTorchKernel(TorchKernels, TrunkConformance):
    trunk = GRU
    options = ({"d_model": 7, "n_layers": 2},)


@pytest.mark.parametrize("trunk", [MLP, LSTM, GRU])
def test_no_layers_is_an_error(trunk):
    with pytest.raises(ValueError, match=r"n(um)?_layers must be"):
        trunk(3, n_layers=0)


def test_mlp_names_a_wrong_activation():
    with pytest.raises(ValueError, match="tanh, relu, silu, gelu, not 'swish'"):
        MLP(3, activation="swish")
