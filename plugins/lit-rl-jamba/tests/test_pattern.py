"""Which layer is what: ratios, spelled orders, whole blocks, layers with experts, and what is refused."""

from itertools import product

import pytest
from lit_rl_jamba.pattern import expert_layers, spell_layers


@pytest.mark.parametrize(
    ("pattern", "letters"),
    [
        ("7:1", "mmmmammm"),  # the released Jamba
        ("3:1", "mmam"),
        ("1:1", "ma"),
        ("1:3", "amaa"),
        ("6:2", "mmammmam"),  # two blocks of 3:1
        ("1:0", "m"),
        ("0:1", "a"),
        ("0:3", "aaa"),
        ("mmma", "mmma"),
        ("a", "a"),
    ],
)
def test_a_pattern_spells_one_block(pattern, letters):
    assert spell_layers(pattern) == letters


def test_a_ratio_has_its_numbers_of_layers():
    for n_mamba, n_attention in product(range(9), range(9)):
        if n_mamba + n_attention:
            letters = spell_layers(f"{n_mamba}:{n_attention}")
            assert (letters.count("m"), letters.count("a")) == (n_mamba, n_attention)


def test_n_layers_repeats_whole_blocks():
    assert spell_layers("3:1", 8) == "mmammmam"
    assert spell_layers("mma", 3) == "mma"


@pytest.mark.parametrize("pattern", ["", "0:0", "mxa", "MA", "3:", "3:1:1", "m:a", "-1:2", "3 : 1"])
def test_a_pattern_without_layers_is_refused(pattern):
    with pytest.raises(ValueError, match="spells no layer: give a ratio Mamba:attention") as refusal:
        spell_layers(pattern)
    assert "\n" not in str(refusal.value)


def test_a_ratio_that_yaml_made_a_number_is_refused():
    with pytest.raises(ValueError, match=r"pattern is 181, .* quote it"):
        spell_layers(3 * 60 + 1)


@pytest.mark.parametrize("n_layers", [-4, 0, 2, 6])
def test_half_a_block_is_refused(n_layers):
    with pytest.raises(ValueError, match=rf"n_layers={n_layers} .* give a multiple of 4"):
        spell_layers("3:1", n_layers)


def test_experts_stand_where_jamba_has_them_or_where_told():
    assert expert_layers(8, 2) == {1, 3, 5, 7}
    assert expert_layers(4, 1) == {0, 1, 2, 3}
    assert expert_layers(7, 3) == {2, 5}
    assert expert_layers(4, 2, [0, 3]) == {0, 3}


def test_experts_on_no_layer_are_refused():
    with pytest.raises(ValueError, match="moe_every=2 reaches none of the 1 layers"):
        expert_layers(1, 2)
    for chosen in ([], [4], [-1, 2]):
        with pytest.raises(ValueError, match="moe_layers must name some of the layers 0 to 3"):
            expert_layers(4, 2, chosen)
