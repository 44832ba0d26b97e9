"""Rollouts of several processes or machines for one learner: `RolloutCollector` under TorchRL's collectors.

`Workers` is what the data module uses; `RolloutWorker` is what TorchRL runs in each process. All wait for the
learner and the learner for all, so that every rollout is of the newest weights, as in one process.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from gymnasium.vector import VectorEnv
from tensordict import TensorDict
from torchrl.collectors import BaseCollector, MultiSyncCollector
from torchrl.envs import ExplorationType

from lit_rl import keys
from lit_rl.collectors import RolloutCollector
from lit_rl.envs import EnvConfig
from lit_rl.envs.vector import derived_seed
from lit_rl.errors import UserError
from lit_rl.models.actor_critic import ActorCritic

Launcher = Literal["processes", "ray"]

# What TorchRL gives to the collector that it builds and that asks for nothing special ...
USUAL = {
    "reset_when_done": True,
    "return_same_td": True,
    "extend_buffer": True,
    "exploration_type": ExplorationType.RANDOM,
}
INTERNAL = {"traj_pool", "trust_policy"}  # ... and what serves options that are refused.


class RolloutWorker(RolloutCollector):
    """The `collector_class` for TorchRL's multi-process and Ray collectors.

    A batch holds beside the rollout ``("collector", "traj_ids")``, which TorchRL counts frames by: episodes,
    numbered within each rollout.

    Args:
        create_env_fn: makes the batched environment of one worker.
        policy_factory: makes the agent that acts.
        frames_per_batch: frames a batch of this worker.
        sequence_length: as in `RolloutCollector`.
        seed: of the run; each worker derives another from it.
        context: as in `RolloutCollector`.
        complaints: a folder for the reason why a worker ends, which TorchRL would not tell.
        options: TorchRL's; only what leaves the rollout as it is.

    Raises:
        UserError: TorchRL's collector was given an option that a `RolloutCollector` has no part for.
    """

    def __init__(
        self,
        create_env_fn: Callable[..., VectorEnv] | list[Callable[..., VectorEnv]],
        *,
        policy_factory: Callable[[], ActorCritic],
        frames_per_batch: int,
        create_env_kwargs: Mapping[str, Any] | None = None,
        worker_idx: int | None = None,
        use_buffers: bool | None = None,
        sequence_length: int | None = None,
        seed: int = 0,
        context: Callable[[], AbstractContextManager] = nullcontext,
        complaints: Path | None = None,
        **options: Any,
    ) -> None:
        neutral = dict.fromkeys(options, (None, False, 0, -1)) | {
            name: (value,) for name, value in USUAL.items()
        }
        asked = {name for name, value in options.items() if value not in neutral[name]} - INTERNAL
        if asked:
            raise UserError(
                f"RolloutCollector cannot honour {', '.join(sorted(asked))}: leave it at TorchRL's default"
            )
        if parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the learner is asked to stop, and stops this
        make = create_env_fn[0] if isinstance(create_env_fn, list) else create_env_fn
        self._complaint = None if complaints is None else complaints / f"{worker_idx}"
        try:
            super().__init__(
                partial(make, **(create_env_kwargs or {})),
                policy_factory(),
                frames_per_batch=frames_per_batch,
                sequence_length=sequence_length,
                seed=derived_seed(seed, worker_idx or 0),
                context=context,
                postproc=self._share,
            )
        except UserError as error:
            self._complain(error)
            raise
        self.worker_idx = worker_idx
        self._use_buffers = use_buffers is not False
        self._shared: TensorDict | None = None  # what the learner reads: filled again with every rollout

    def __bool__(self) -> bool:
        return True  # Ray asks when it sends an exception, and a collector without an end has no length

    def rollout(self) -> TensorDict:
        try:
            return super().rollout()
        except UserError as error:
            if not self._complain(error):
                raise
            raise EOFError from error  # which TorchRL takes for the end, without a traceback

    def _complain(self, error: UserError) -> bool:
        """Leaves the reason where the learner looks for it, if there is such a place."""
        if self._complaint is not None:
            self._complaint.write_text(str(error))
        return self._complaint is not None

    def _share(self, rollout: TensorDict) -> TensorDict:
        begins = rollout[keys.STEPS, keys.IS_INIT].clone()
        begins[:, 0] = True
        episode = begins.flatten().cumsum(0).reshape(begins.shape) - 1
        rollout["collector"] = TensorDict({"traj_ids": episode}, rollout.batch_size)
        self._shared = rollout.clone() if self._shared is None else self._shared.update_(rollout)
        return self._shared


class Workers:
    """A collector of rollouts that others collect: to the learner like `RolloutCollector`.

    The environments are divided among the workers, so that a rollout has the same shape with any number of
    them. Workers act on the CPU with a copy of the agent, whose weights are sent before every rollout; they
    start with the first one.

    Args:
        env: the environment; `num_envs` of all workers together.
        policy: the learner's agent.
        num_workers: how many.
        launcher: `processes` on this machine, or `ray`: wherever the Ray cluster has room (an extra).
        rollout_length: steps of each environment in a rollout.
        sequence_length: as in `RolloutCollector`.
        seed: of the first environment; each has another.
        context: entered while collecting, as in `RolloutCollector`; it travels to the workers.

    Raises:
        UserError: environments do not divide among the workers, Ray is not there, or a worker failed.
    """

    def __init__(
        self,
        env: EnvConfig,
        policy: ActorCritic,
        *,
        num_workers: int,
        launcher: Launcher = "processes",
        rollout_length: int,
        sequence_length: int | None = None,
        seed: int = 0,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        check_workers(env, num_workers, launcher)
        self.policy = policy
        self.num_workers = num_workers
        self.launcher = launcher
        self.frames_per_batch = env.num_envs * rollout_length
        self.seed = seed
        self._env = replace(env, num_envs=env.num_envs // num_workers)
        self._worker: dict[str, Any] = {
            "sequence_length": sequence_length,
            "context": context,
        }
        self._frames = 0
        self._collector: BaseCollector | None = None
        self._batches: Iterator[TensorDict]
        self._complaints: tempfile.TemporaryDirectory | None = None

    def rollout(self) -> TensorDict:
        """The rollouts of all workers side by side, ``{steps [E, T], trunk_state [E, K]}``."""
        failure: Exception | None = None
        try:
            if self._collector is None:
                self._start()
            assert self._collector is not None
            self._collector.update_policy_weights_(TensorDict.from_module(self.policy).data.cpu())
            batch = next(self._batches)
        except Exception as error:
            failure = self._reason(error).with_traceback(None)
        if failure is not None:
            # What is half built, and the traceback held, stops threads of its own when it goes: an
            # interpreter that is ending would wait for them for ever.
            gc.collect()
            raise failure
        self._frames += self.frames_per_batch
        if batch.dim() > 1:  # Ray's come stacked
            batch = batch.flatten(0, 1)
        return batch.exclude("collector")

    def _start(self) -> None:
        seed = self.seed
        if self._frames:  # resumed: new episodes, other than those of the first start
            seed = derived_seed(seed, self._frames)
        make_env = [self._env.make] * self.num_workers
        actor = deepcopy(self.policy).cpu()
        if self.launcher == "ray":
            self._collector = _on_ray(make_env, actor, self.frames_per_batch, self._worker | {"seed": seed})
        else:
            self._complaints = tempfile.TemporaryDirectory(prefix="lit_rl_workers_")
            worker = partial(RolloutWorker, **self._worker, seed=seed, complaints=Path(self._complaints.name))
            self._collector = MultiSyncCollector(
                make_env,
                actor,
                frames_per_batch=self.frames_per_batch,
                total_frames=-1,
                collector_class=worker,
                cat_results=0,
                use_buffers=True,
                num_threads=torch.get_num_threads(),  # of this process, which TorchRL would change
            )
        self._batches = iter(self._collector)
        atexit.register(self.shutdown)  # Lightning leaves data as they are when a signal ends a run

    def _reason(self, error: Exception) -> Exception:
        """What a worker said before it ended, else what TorchRL says of it."""
        if self._complaints is not None:
            for complaint in Path(self._complaints.name).iterdir():
                return UserError(complaint.read_text())
        cause = getattr(error, "cause", None)  # Ray's errors carry the worker's own ...
        if isinstance(cause, UserError):
            return UserError(str(cause))
        # ... or, of one that could not be built, its traceback.
        told = re.search(rf"^{UserError.__module__}\.UserError: (.+)$", str(error), re.MULTILINE)
        return UserError(told[1]) if told else error

    # ------------------------------------------------------------------ state, of the form of a collector's

    def state_dict(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        return {"frames": self._frames, "steps": 0, "generator": generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from there in new episodes; also from the state of a collector in one process."""
        self._frames = state_dict["frames"]

    def shutdown(self) -> None:
        atexit.unregister(self.shutdown)
        if self._collector is not None:
            threads = torch.get_num_threads()
            self._collector.shutdown()
            torch.set_num_threads(threads)  # TorchRL changes it
            self._collector = None
        if self._complaints is not None:
            self._complaints.cleanup()
            self._complaints = None


def check_workers(env: EnvConfig, num_workers: int, launcher: str) -> None:
    """Raises `UserError` where so many workers cannot be had."""
    if launcher not in get_args(Launcher):
        raise UserError(f"launcher is {launcher!r}: choose {' or '.join(get_args(Launcher))}")
    if env.num_envs % num_workers:
        raise UserError(
            f"{env.num_envs} environments do not divide among {num_workers} workers: change num_envs or "
            "num_workers"
        )
    if launcher == "ray" and find_spec("ray") is None:
        raise UserError(
            "launcher ray needs the package ray: pip install 'lit-rl[ray]', or use launcher processes"
        )


def _on_ray(
    make_env: list[Callable[..., VectorEnv]], actor: ActorCritic, frames: int, worker: dict[str, Any]
) -> BaseCollector:
    """One actor of the cluster for each worker; a cluster of this machine where there is none."""
    from torchrl.collectors.distributed import RayCollector

    cluster = {
        "address": os.environ.get("RAY_ADDRESS"),
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "error",
    }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with warnings.catch_warnings():
        # There is an agent in each worker and weights are sent to it, but there is none that all share.
        warnings.filterwarnings("ignore", message="The policy is not an nn.Module")
        collector = RayCollector(
            make_env,
            policy_factory=partial(deepcopy, actor),
            collector_class=RolloutWorker,
            collector_kwargs=[dict(worker) for _ in make_env],
            frames_per_batch=frames,
            total_frames=10**15,
            sync=True,
            ray_init_config=cluster,
            remote_configs={"num_cpus": 1, "num_gpus": 0},
        )
    for number, handler in handlers.items():  # Ray has put its own in their place
        signal.signal(number, handler)
    return collector
