"""What must be there before anything else can be."""


def test_torchrl_has_its_compiled_part() -> None:
    """Prioritized sampling needs it; it loads only beside the torch it was built for."""
    import torchrl._torchrl

    assert torchrl._torchrl.SumSegmentTreeFp32(4) is not None
