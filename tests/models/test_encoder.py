"""Encoders: every kind of space, by hand."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import sample

from lit_rl.errors import UserError
from lit_rl.models.encoder import Encoder


def one_hot(*groups: tuple[int, int]) -> list[float]:
    """(size, index) groups as one vector."""
    return [float(i == index) for size, index in groups for i in range(size)]


def test_box_is_flattened() -> None:
    x = torch.arange(24.0).reshape(2, 2, 2, 3)  # [N, T, 2, 3]
    encoder = Encoder(spaces.Box(-1, 1, (2, 3)))
    assert encoder.out_features == 6
    assert encoder(x)[1, 0].tolist() == [12, 13, 14, 15, 16, 17]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_boxes_of_any_dtype_become_float32(dtype: type) -> None:
    space = spaces.Box(0, 5, (3,), dtype)
    x = sample(space, 2, 4)
    features = Encoder(space)(x)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, x.float())


def test_a_scalar_box() -> None:
    encoder = Encoder(spaces.Box(-1, 1, ()))
    assert encoder.out_features == 1
    assert encoder(torch.tensor([[1.0, 2.0]])).tolist() == [[[1.0], [2.0]]]


def test_discrete_is_one_hot() -> None:
    encoder = Encoder(spaces.Discrete(3))
    assert encoder(torch.tensor([[0, 2]])).tolist() == [[one_hot((3, 0)), one_hot((3, 2))]]


def test_discrete_from_another_start() -> None:
    encoder = Encoder(spaces.Discrete(3, start=-1))
    assert encoder(torch.tensor([[-1, 1]])).tolist() == [[one_hot((3, 0)), one_hot((3, 2))]]


def test_multidiscrete_is_a_one_hot_group_each() -> None:
    encoder = Encoder(spaces.MultiDiscrete([3, 4]))
    assert encoder.out_features == 7
    x = torch.tensor([[[2, 0], [0, 3]]])
    assert encoder(x).tolist() == [[one_hot((3, 2), (4, 0)), one_hot((3, 0), (4, 3))]]
    moved = Encoder(spaces.MultiDiscrete([3, 4], start=[1, -1]))
    assert torch.equal(moved(x + torch.tensor([1, -1])), encoder(x))


def test_multidiscrete_of_two_dimensions() -> None:
    encoder = Encoder(spaces.MultiDiscrete([[2, 3], [2, 2]]))
    x = torch.tensor([[[[1, 2], [0, 1]]]])
    assert encoder(x).tolist() == [[one_hot((2, 1), (3, 2), (2, 0), (2, 1))]]


def test_multibinary_is_a_one_hot_pair_each() -> None:
    encoder = Encoder(spaces.MultiBinary(3))
    x = torch.tensor([[[1, 0, 1]]], dtype=torch.int8)
    assert encoder(x).tolist() == [[one_hot((2, 1), (2, 0), (2, 1))]]


def test_dict_entries_stand_in_the_order_of_the_space() -> None:
    space = spaces.Dict(
        {"b": spaces.Discrete(2), "a": spaces.Box(-1, 1, (2,)), "c": spaces.MultiDiscrete([2])}
    )
    order = list(space.spaces)
    x = {"a": torch.tensor([[[0.5, -0.5]]]), "c": torch.tensor([[[1]]]), "b": torch.tensor([[0]])}
    parts = {"a": [0.5, -0.5], "b": one_hot((2, 0)), "c": one_hot((2, 1))}
    encoder = Encoder(space)
    expected = [number for key in order for number in parts[key]]
    assert encoder(x)[0, 0].tolist() == expected
    assert encoder(dict(reversed(x.items())))[0, 0].tolist() == expected  # whatever the order of arrival


@pytest.mark.parametrize("key", ["values", "type", "a.b", "items", "forward", ""])
def test_dict_entries_may_be_called_anything(key: str) -> None:
    encoder = Encoder(spaces.Dict({key: spaces.Discrete(2)}))
    assert encoder({key: torch.tensor([[1]])}).tolist() == [[[0.0, 1.0]]]


def test_images_pass_a_convolution_of_unit_scale() -> None:
    space = spaces.Box(0, 255, (3, 40, 36), np.uint8)
    torch.manual_seed(0)
    encoder = Encoder(space)
    x = sample(space, 2, 3)
    features = encoder(x)
    assert features.shape == (2, 3, 512)
    alone = torch.stack([encoder(x[:, t : t + 1])[:, 0] for t in range(3)], 1)
    torch.testing.assert_close(features, alone)
    network = encoder.parts[0]
    torch.testing.assert_close(features[1, 2], network.project(network.conv(x[1, 2][None] / 255.0))[0])


@pytest.mark.parametrize("shape", [(3, 20, 20), (84, 84, 3), (3, 84, 20)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"channels, height, width"):
        Encoder(spaces.Box(0, 255, shape, np.uint8))


def test_width_adds_a_layer_with_relu() -> None:
    torch.manual_seed(0)
    encoder = Encoder(spaces.Box(-1, 1, (3,)), width=16)
    features = encoder(torch.randn(4, 5, 3))
    assert features.shape == (4, 5, 16)
    assert encoder.out_features == 16
    assert (features >= 0).all()
    assert 0.2 < (features > 0).float().mean() < 0.8


@pytest.mark.parametrize(
    "space",
    [
        spaces.Text(5),
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Sequence(spaces.Discrete(2)),
        spaces.Dict({"outer": spaces.Dict({"inner": spaces.Discrete(2)})}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_unsupported_spaces_are_one_line(space: spaces.Space) -> None:
    with pytest.raises(UserError, match="not supported") as error:
        Encoder(space)
    assert "\n" not in str(error.value)
