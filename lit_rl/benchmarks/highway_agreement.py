"""EnvPool's highway beside highway-env: ``python -m lit_rl.benchmarks.highway_agreement``.

Two comparisons. From the same start: highway-env takes over EnvPool's vehicles after a reset, both play the
same actions, and the whole episode must come out the same; the pool is taken as `lit_rl.envs` adapts it, and
as it is. By samples: means of return, length and share of crashes of fixed policies with their standard
errors, the z of their differences, a permutation test of the returns (the largest distance between both
distributions), and the largest |z| of the entries of the observations, at the start of episodes and averaged
over them. How exact that is hangs on highway-env, which makes some 40 steps a second.

Shapes: N rows, V vehicles observed, F features.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from lit_rl.benchmarks.measure import check_csv, markdown, write_csv
from lit_rl.envs import EnvConfig
from lit_rl.envs.gymnasium import register_package
from lit_rl.envs.highway import LANE_WIDTH, HighwayPort
from lit_rl.errors import UserError, refused

Policy = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # observations [N, V, F] -> actions [N]
POOL_ROWS = 60
LEFT, IDLE, RIGHT, FASTER, SLOWER = range(5)


# ---------------------------------------------------------------------- whole episodes


def always(action: int) -> Policy:
    return lambda obs_NVF, rng: np.full(len(obs_NVF), action)


def uniform(obs_NVF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 5, len(obs_NVF))


def careful(obs_NVF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keeps right where there is room, overtakes on the left, else slows down behind others."""
    y_N = obs_NVF[:, 0, 2]  # thirds of the road: 0, 1/3, 2/3
    there, x, y = (obs_NVF[:, 1:, 0] > 0), obs_NVF[:, 1:, 1], obs_NVF[:, 1:, 2]
    blocked = (there & (abs(y) < 0.17) & (x > 0) & (x < 0.15)).any(axis=1)
    beside = there & (abs(x) < 0.12)
    left_is_free = ~(beside & (abs(y + 1 / 3) < 0.2)).any(axis=1) & (y_N > 0.2)
    right_is_free = ~(beside & (abs(y - 1 / 3) < 0.2)).any(axis=1) & (y_N < 0.6)
    behind = np.where(left_is_free, LEFT, SLOWER)
    return np.where(blocked, behind, np.where(right_is_free, RIGHT, FASTER))


POLICIES: dict[str, Policy] = {
    "random": uniform,
    "always idle": always(IDLE),
    "always right": always(RIGHT),
    "always faster": always(FASTER),
    "always slower": always(SLOWER),
    "careful": careful,
}


@dataclass
class Episodes:
    """E finished episodes: what each came to, its first observation and the mean of those acted upon."""

    steps_per_second: float
    reward: np.ndarray  # [E], summed
    length: np.ndarray  # [E]
    terminated: np.ndarray  # [E]
    truncated: np.ndarray  # [E]
    first_obs: np.ndarray  # [E, V, F]
    mean_obs: np.ndarray  # [E, V, F]


def play(config: EnvConfig, policy: Policy, count: int, seed: int) -> Episodes:
    """The first `count / num_envs` episodes of each row, so that short ones are no likelier."""
    env = config.make(seed=seed)
    rows, share = env.num_envs, -(-count // env.num_envs)
    rng = np.random.default_rng(seed)
    obs, _ = env.reset()
    first, sums = obs.copy(), np.zeros(obs.shape)
    reward, length = np.zeros(rows), np.zeros(rows, dtype=int)
    finished: list[list[tuple[Any, ...]]] = [[] for _ in range(rows)]
    start, steps = time.perf_counter(), 0
    while min(map(len, finished)) < share:
        sums += obs
        obs, paid, terminated, truncated, _ = env.step(policy(obs, rng))
        reward += paid
        length += 1
        steps += rows
        for row in np.flatnonzero(terminated | truncated):
            end = (reward[row], length[row], terminated[row], truncated[row])
            finished[row].append((*end, first[row].copy(), sums[row] / length[row]))
            first[row] = obs[row]
            sums[row], reward[row], length[row] = 0.0, 0.0, 0
    speed = steps / (time.perf_counter() - start)
    env.close()
    columns = zip(*(episode for row in finished for episode in row[:share]), strict=True)
    return Episodes(speed, *map(np.array, columns))


def z_of(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Difference of the means over episodes in its standard errors (Welch); 0 where both are one constant."""
    one, other = one.astype(float), other.astype(float)
    difference = one.mean(axis=0) - other.mean(axis=0)
    variance = one.var(axis=0, ddof=1) / len(one) + other.var(axis=0, ddof=1) / len(other)
    return difference / np.sqrt(np.maximum(variance, 1e-12))


def permutation_p(one: np.ndarray, other: np.ndarray, seed: int = 0, draws: int = 2000) -> float:
    """How often samples mixed at random are as far apart: the largest distance of their distributions."""
    both, rng = np.concatenate([one, other]), np.random.default_rng(seed)
    order = np.argsort(both, kind="stable")
    last = np.append(
        np.diff(both[order]) > 1e-4, True
    )  # of equal values, in the float32 of EnvPool's rewards

    def distance(is_one: np.ndarray) -> float:
        shares = np.cumsum(is_one) / len(one) - np.cumsum(~is_one) / len(other)
        return float(np.abs(shares[last]).max())

    is_one = (np.arange(len(both)) < len(one))[order]
    found = distance(is_one)
    return float(np.mean([distance(rng.permutation(is_one)) >= found - 1e-12 for _ in range(draws)]))


def whole_episodes(config: EnvConfig, name: str, episodes: int, pool_episodes: int, seed: int) -> list[dict]:
    """Two rows of the table: highway-env's and EnvPool's."""
    ours = replace(config, backend="gymnasium", num_envs=1)
    pools = replace(config, backend="envpool", num_envs=min(POOL_ROWS, pool_episodes))
    played = {
        "highway-env": play(ours, POLICIES[name], episodes, seed),
        "EnvPool": play(pools, POLICIES[name], pool_episodes, seed + 1),
    }
    pair = list(played.values())
    table = []
    for backend, found in played.items():
        row: dict[str, Any] = {"policy": name, "backend": backend, "episodes": len(found.reward)}
        for label, values in (
            ("return", found.reward),
            ("length", found.length),
            ("crashed", found.terminated),
            ("crashed in the last step", found.terminated & found.truncated),
        ):
            row |= {label: float(values.mean()), f"{label} +-": float(values.std() / np.sqrt(len(values)))}
        table.append(row | {"steps/s": round(found.steps_per_second)})
    z = {
        "z return": z_of(*(one.reward for one in pair)),
        "z length": z_of(*(one.length for one in pair)),
        "z crashed": z_of(*(one.terminated for one in pair)),
        "p of returns": permutation_p(pair[0].reward, pair[1].reward),
        "largest z, first observation": np.abs(z_of(*(one.first_obs for one in pair))).max(),
        "largest z, observations": np.abs(z_of(*(one.mean_obs for one in pair))).max(),
    }
    return [table[0] | dict.fromkeys(z, ""), table[1] | {key: float(value) for key, value in z.items()}]


def readable(row: dict[str, Any]) -> dict[str, Any]:
    """A mean and its standard error in one column."""
    joined = {}
    for key, value in row.items():
        if f"{key} +-" in row:
            joined[key] = f"{value:.2f} +- {row[f'{key} +-']:.2f}"
        elif not key.endswith(" +-"):
            joined[key] = value
    return joined


# ---------------------------------------------------------------------- from the same start


class Twin:
    """highway-env with the vehicles of a pool's first row, seen in a mirror if `mirrored`."""

    def __init__(self, env_id: str, mirrored: bool) -> None:
        register_package(env_id)
        self.env: Any = gym.make(env_id, disable_env_checker=True).unwrapped
        self.env.reset(seed=0)
        self.mirrored = mirrored

    def take_over(self, state: Any) -> None:
        """Start an episode from a pool's `state` (of `debug_states`) after a reset."""
        from highway_env.vehicle.behavior import IDMVehicle
        from highway_env.vehicle.controller import MDPVehicle

        self.env.reset()
        road, vehicles = self.env.road, []
        for index, source in enumerate(state.vehicles):
            lane = source.target_lane_index
            if self.mirrored:
                lane = self.env.config["lanes_count"] - 1 - lane
            args = (
                road,
                [source.x, lane * LANE_WIDTH],
                0.0,
                source.speed,
                ("0", "1", lane),
                source.target_speed,
            )
            if index == 0:
                vehicle = MDPVehicle(*args)
            else:
                vehicle = IDMVehicle(*args)
                vehicle.timer, vehicle.DELTA = source.timer, source.idm_delta
            vehicle.check_collisions = source.check_collisions
            vehicles.append(vehicle)
        road.vehicles, self.env.controlled_vehicles = vehicles, vehicles[:1]
        self.env.define_spaces()  # for whom they observe and drive

    def observation(self) -> np.ndarray:
        return self.env.observation_type.observe()


def from_the_same_start(env_id: str, name: str, episodes: int, seed: int, mirrored: bool) -> dict[str, Any]:
    """How many episodes of a policy are not the same on both, to the first end; `mirrored`: adapted."""
    from envpool import make_gymnasium

    port = HighwayPort(EnvConfig(env_id))
    plain: Any = make_gymnasium(env_id, num_envs=1, seed=seed, **(port.options if mirrored else {}))
    pool, twin = port.adapt(plain) if mirrored else plain, Twin(env_id, mirrored)
    rng = np.random.default_rng(seed)
    others = {"other course": 0, "other kind of end": 0, "other last observation": 0}
    steps = 0
    for _ in range(episodes):
        obs, _ = pool.reset()
        twin.take_over(plain.debug_states([0])[0])
        same_course, ended = np.allclose(obs[0], twin.observation(), atol=1e-4), False
        while not ended:
            action = POLICIES[name](obs, rng)
            obs, reward, terminated, truncated, _ = pool.step(action)
            twin_obs, twin_reward, twin_terminated, twin_truncated, _ = twin.env.step(int(action[0]))
            steps += 1
            ends, twin_ends = (terminated[0], truncated[0]), (twin_terminated, twin_truncated)
            ended = any(ends) or any(twin_ends)
            same_obs = np.allclose(obs[0], twin_obs, atol=1e-4)
            same_course &= np.isclose(reward[0], twin_reward, atol=1e-4) and (same_obs or ended)
        others["other course"] += not same_course
        others["other kind of end"] += ends != twin_ends
        others["other last observation"] += not same_obs
    plain.close()
    told = "adapted" if mirrored else "as it is"
    return {"policy": name, "EnvPool": told, "episodes": episodes, "steps": steps} | others


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--id", default="highway-fast-v0", choices=["highway-fast-v0", "highway-v0"])
    parser.add_argument("--episodes", type=int, default=120, help="of each policy, with highway-env")
    parser.add_argument("--pool-episodes", type=int, default=6000, help="of each policy, with EnvPool")
    parser.add_argument("--pairs", type=int, default=20, help="episodes of each policy from the same start")
    parser.add_argument("--policies", nargs="*", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="where the table of episodes is kept")
    arguments = parser.parse_args()
    try:
        check_csv(arguments.csv)
    except UserError as error:
        return refused("highway_agreement", error)

    if arguments.pairs:
        pairs = [
            from_the_same_start(arguments.id, name, arguments.pairs, arguments.seed, mirrored)
            for mirrored in (True, False)
            for name in arguments.policies
        ]
        print(markdown(pairs), flush=True)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(arguments.policies if arguments.episodes else []):
        pair = whole_episodes(
            EnvConfig(arguments.id),
            name,
            arguments.episodes,
            arguments.pool_episodes,
            arguments.seed + 2 * number,
        )
        rows += pair
        print(markdown([readable(row) for row in pair]), flush=True)
    if arguments.csv is not None and rows:
        write_csv(arguments.csv, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
