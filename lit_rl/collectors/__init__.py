"""Collectors: an agent and a batched environment -> what is learnt from."""

from lit_rl.collectors.base import Arrays, EnvCollector, check_finite, to_tensor
from lit_rl.collectors.rollout import RolloutCollector
from lit_rl.collectors.windows import WindowCollector

__all__ = ["Arrays", "EnvCollector", "RolloutCollector", "WindowCollector", "check_finite", "to_tensor"]
