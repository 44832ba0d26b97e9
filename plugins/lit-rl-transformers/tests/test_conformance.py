"""Every trunk keeps lit_rl's contract, and its name leads to it."""

import pytest
import torch
from lit_rl_transformers.gtrxl import GTrXL
from lit_rl_transformers.transformer import Transformer
from lit_rl_transformers.transformer_xl import TransformerXL

from lit_rl import registry
from lit_rl.testing import TrunkConformance
from lit_rl.testing.trunk_checks.platforms import check_compile

torch.set_num_threads(1)

# The kit's sequences have 17 steps: a memory of 3 slides, as does one of 1; one of 40 never fills.
SLIDES = {"d_model": 8, "n_heads": 2, "n_layers": 1, "memory": 3}
DEEP = {"d_model": 6, "n_heads": 1, "n_layers": 2, "memory": 1, "d_ff": 5}
NEVER_FULL = {"d_model": 8, "n_heads": 4, "n_layers": 1, "memory": 40}


class Conformance(TrunkConformance):
    """Compiling takes most of the time, so it is checked under the first options of each trunk only."""

    __test__ = False

    def test_conformance(self, subject, check):
        if check is check_compile and subject.options is not self.options[0]:
            pytest.skip("compiled under the first options")
        check(subject)


class TestTransformer(Conformance):
    __test__ = True
    trunk = Transformer
    options = (SLIDES, DEEP, NEVER_FULL)


class TestTransformerXL(Conformance):
    __test__ = True
    trunk = TransformerXL
    options = (SLIDES, DEEP, NEVER_FULL)


class TestGTrXL(Conformance):
    __test__ = True
    trunk = GTrXL
    options = (SLIDES, DEEP | {"gate_bias": 0.0})


@pytest.mark.parametrize(
    ("name", "trunk"), [("transformer", Transformer), ("transformer_xl", TransformerXL), ("gtrxl", GTrXL)]
)
def test_name_leads_to_the_class(name, trunk):
    assert registry.class_path(name) == f"{trunk.__module__}.{trunk.__name__}"
