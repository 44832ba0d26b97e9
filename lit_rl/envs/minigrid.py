"""MiniGrid: the agent's view as symbols, the direction, success; the mission is left out."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from lit_rl.envs.vector import Obs, StepResult
from lit_rl.envs.wrappers import ObservationTransform
from lit_rl.errors import UserError

SYMBOLS = (11, 6, 3)  # how many objects, colours and states a cell can show (minigrid.core.constants)
NATIVE_VIEW = 7


def symbolic_space(view_size: int) -> spaces.Dict:
    """`direction`, and `image` [v, v, 3] = (column, row, symbol).

    The agent stands at (v // 2, v - 1) and looks towards row 0.
    """
    nvec = np.broadcast_to(np.array(SYMBOLS), (view_size, view_size, 3))
    return spaces.Dict({"direction": spaces.Discrete(4), "image": spaces.MultiDiscrete(nvec, dtype=np.uint8)})


class SymbolicView(gym.ObservationWrapper):
    """One row of the `minigrid` package, without the mission (a text)."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = symbolic_space(NATIVE_VIEW)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {"direction": observation["direction"], "image": observation["image"]}


class MiniGridView(ObservationTransform):
    """Crops the 7 x 7 view, and tells success: the episode ended with a reward.

    The crop is not quite MiniGrid's own `agent_view_size`: what walls hide is worked out in the 7 x 7 view,
    where light may pass outside the crop, so the crop can show a cell that the smaller view leaves unseen.
    Both backends crop, as EnvPool's smaller view crashes the process.
    """

    def __init__(self, env: VectorEnv, view_size: int) -> None:
        if view_size not in (3, 5, NATIVE_VIEW):
            raise UserError(f"env.view_size is {view_size}: choose 3, 5 or 7")
        super().__init__(env, symbolic_space(view_size))
        side = (NATIVE_VIEW - view_size) // 2
        self._columns = slice(side, NATIVE_VIEW - side)
        self._rows = slice(NATIVE_VIEW - view_size, NATIVE_VIEW)

    def transform(self, obs: Obs) -> Obs:
        return {"direction": obs["direction"], "image": obs["image"][:, self._columns, self._rows].copy()}

    def step(self, actions: Any) -> StepResult:
        obs, reward, terminated, truncated, info = super().step(actions)
        if info:
            success = np.where(terminated | truncated, reward > 0, np.nan)
            info = {**info, "success": success}
        return obs, reward, terminated, truncated, info
