"""`RolloutCollector` under TorchRL's multi-process collectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from gymnasium.vector import VectorEnv
from tensordict import TensorDict
from torchrl.envs import ExplorationType

from lit_rl import keys
from lit_rl.collectors import RolloutCollector
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic

# What TorchRL's workers give to the collector that they build and that asks for nothing special ...
USUAL = {
    "reset_when_done": True,
    "return_same_td": True,
    "extend_buffer": True,
    "exploration_type": ExplorationType.RANDOM,
}
INTERNAL = {"traj_pool", "trust_policy"}  # ... and what serves options that are refused.


def torchrl_worker(
    create_env_fn: Callable[..., VectorEnv],
    *,
    policy_factory: Callable[[], ActorCritic],
    frames_per_batch: int,
    create_env_kwargs: Mapping[str, Any] | None = None,
    worker_idx: int | None = None,
    use_buffers: bool | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    **options: Any,
) -> RolloutCollector:
    """The `collector_class` for TorchRL's multi-process collectors; a partial of it sets sizes and seed.

    A batch holds the rollouts of all workers, with ``cat_results=0`` side by side along E, and beside them
    ``("collector", "traj_ids")``, which TorchRL counts frames by: episodes, numbered within each rollout.

    Raises:
        UserError: TorchRL's collector was given an option that a `RolloutCollector` has no part for.
    """
    neutral = dict.fromkeys(options, (None, False, 0, -1)) | {name: (value,) for name, value in USUAL.items()}
    asked = {name for name, value in options.items() if value not in neutral[name]} - INTERNAL
    if asked:
        raise UserError(
            f"RolloutCollector cannot honour {', '.join(sorted(asked))}: leave it at TorchRL's default"
        )

    shared: TensorDict | None = None  # what the main process reads: filled again with every rollout

    def share(rollout: TensorDict) -> TensorDict:
        nonlocal shared
        begins = rollout[keys.STEPS, keys.IS_INIT].clone()
        begins[:, 0] = True
        episode = begins.flatten().cumsum(0).reshape(begins.shape) - 1
        rollout["collector"] = TensorDict({"traj_ids": episode}, rollout.batch_size)
        shared = rollout.clone() if shared is None else shared.update_(rollout)
        return shared

    collector = RolloutCollector(
        partial(create_env_fn, **(create_env_kwargs or {})),
        policy_factory(),
        frames_per_batch=frames_per_batch,
        sequence_length=sequence_length,
        seed=seed + 10_000 * (worker_idx or 0),
        postproc=share,
    )
    collector.worker_idx = worker_idx
    collector._use_buffers = use_buffers is not False
    return collector
