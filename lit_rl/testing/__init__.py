"""For tests: the conformance kit for trunks, and toy environments with known answers."""

from lit_rl.testing.conformance import Subject, TrunkConformance, run_checks

__all__ = ["Subject", "TrunkConformance", "run_checks"]
