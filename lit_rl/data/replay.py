"""Off-policy data: every training batch is what a few steps have added to the replay."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

from tensordict import TensorDict

from lit_rl import keys
from lit_rl.collectors import WindowCollector
from lit_rl.data.base import EnvDataModule
from lit_rl.data.window_replay import WindowReplay
from lit_rl.envs import EnvConfig
from lit_rl.envs.vector import base_seed
from lit_rl.errors import UserError, check_range
from lit_rl.models.q_network import QNetwork
from lit_rl.ranks import gather_list, together

REPLAY = "replay"


class WindowShape(NamedTuple):
    """What an algorithm wants to learn from."""

    window: int
    """steps of a window"""
    lookahead: int
    """steps that follow them, to bootstrap from"""
    unlearnt: int
    """how many of its first steps have no loss"""
    with_state: bool
    """whether the memory at the window's start is kept"""
    with_latent: bool
    """whether the latent of each step is kept"""


class LearnsFromWindows(Protocol):
    """What a LightningModule must have for these data."""

    agent: QNetwork
    frames: int

    @property
    def window_shape(self) -> WindowShape: ...


class ReplayLoader:
    """An epoch of collected blocks. It has a length, or Lightning would collect one ahead."""

    def __init__(self, collector: WindowCollector, replay: WindowReplay, blocks: int) -> None:
        self.collector = collector
        self.replay = replay
        self.blocks = blocks

    def __len__(self) -> int:
        return self.blocks

    def __iter__(self) -> Iterator[TensorDict]:
        for _ in range(self.blocks):
            yield together(self._collect)

    def _collect(self) -> TensorDict:
        batch = self.collector.rollout()
        self.replay.extend(batch[keys.WINDOWS])
        return batch


class ReplayDataModule(EnvDataModule):
    """A replay of windows that grows as the agent acts; whole episodes for evaluation.

    A training batch is what has just been collected, the windows that it completed and the episodes that it
    ended; the learner draws from `replay` as often as it likes. Each process has a replay of its own.

    Args:
        env: the environment.
        steps_per_block: steps of each environment between two turns of learning.
        buffer_size: steps that the replay holds; there are `buffer_size / stride` windows.
        stride: steps from one window's start to the next; as many as a window learns from if absent, so that
            each step is learnt from in one window, in several if less.
        priority_exponent: alpha of prioritized replay (Schaul et al. 2016), 0 to 1; 0 draws uniformly.
        storage: in `memory`, or memory-mapped on `disk` (for images).
        save_replay: save the replay beside the last checkpoint. The one before it is deleted by
            `lit_rl.checkpoints.LastCheckpoint`, which the command adds; a Trainer without it keeps all.
        load_replay: a run that goes on from a checkpoint takes the replay that this names, and is refused if
            it is gone. If false, or where the checkpoint names none, it begins with an empty one, which takes
            the place of the saved one when it is saved itself.
        options: of `EnvDataModule`.

    Raises:
        UserError: sizes are not positive or do not fit.
    """

    def __init__(
        self,
        env: EnvConfig,
        *,
        steps_per_block: int = 4,
        buffer_size: int = 100_000,
        stride: int | None = None,
        priority_exponent: float = 0.0,
        storage: Literal["memory", "disk"] = "memory",
        save_replay: bool = True,
        load_replay: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(env, **options)
        check_range({"steps_per_block": steps_per_block, "buffer_size": buffer_size}, 1, 2**31 - 1)
        check_range({"stride": stride}, 1, 2**31 - 1)
        check_range({"priority_exponent": priority_exponent}, 0, 1)
        self.steps_per_block = steps_per_block
        self.buffer_size = buffer_size
        self.stride = stride
        self.priority_exponent = priority_exponent
        self.storage: Literal["memory", "disk"] = storage
        self.save_replay = save_replay
        self.load_replay = load_replay
        self.replay: WindowReplay | None = None
        self._resumed: Path | None = None
        """the folder of the replay that a resumed run goes on with"""
        self._saved: Path | None = None
        """the folder that holds the replay as it is, or as it was when a checkpoint was last written"""

    def _stride(self, shape: WindowShape) -> int:
        return self.stride or shape.window - shape.unlearnt

    def check_window(self, shape: WindowShape, batch_size: int) -> None:
        """Raises `UserError` where such windows, or so many of them, do not fit."""
        stride = self._stride(shape)
        if stride > shape.window - shape.unlearnt:
            raise UserError(
                f"stride {stride} would leave out steps: a window learns from "
                f"{shape.window - shape.unlearnt}; make it at most that"
            )
        limit = self.env.episode_limit
        if limit is not None and shape.window > limit:
            raise UserError(
                f"a window of {shape.window} steps is longer than an episode of {self.env.id} ({limit}): "
                "shorten it"
            )
        if shape.window + shape.lookahead > self.buffer_size:
            raise UserError(
                f"a window of {shape.window} + {shape.lookahead} steps is longer than the replay "
                f"({self.buffer_size} steps): shorten it or raise buffer_size"
            )
        if self.buffer_size // stride < batch_size:
            raise UserError(
                f"a replay of {self.buffer_size // stride} windows is smaller than a batch of {batch_size}: "
                "raise buffer_size or lower batch_size"
            )

    def train_dataloader(self) -> ReplayLoader:
        assert self.trainer is not None
        module = cast(LearnsFromWindows, self.trainer.lightning_module)
        shape = module.window_shape
        stride = self._stride(shape)
        collector = WindowCollector(
            self.env.make,
            module.agent,
            **shape._asdict(),
            stride=stride,
            frames_per_batch=self.env.num_envs * self.steps_per_block,
            seed=self._rank_seed(self.seed),
            context=self.trainer.precision_plugin.forward_context,
        )
        replay = WindowReplay(
            self.buffer_size // stride,
            alpha=self.priority_exponent,
            storage=self.storage,
            made_with={
                "model.window": shape.window,
                "model.n_step": shape.lookahead,
                "steps with a loss": shape.window - shape.unlearnt,
                "memory is kept": shape.with_state,
                "latents are kept": shape.with_latent,
                "data.stride": stride,
                "data.buffer_size": self.buffer_size,
            },
            seed=base_seed(self._rank_seed(self.seed)),  # other numbers than those that explore
            copies=self.trainer.num_devices,
        )
        going_on = self._collector_state is not None
        self._start(collector)
        resumed, self._resumed = self._resumed, None
        if resumed is not None:

            def load() -> None:
                if going_on:  # a rank that was not there before has none, and begins with an empty one
                    replay.load(self._rank_folder(resumed), collector.windows())

            together(load)
        self.replay = replay
        self._saved = resumed if all(gather_list([going_on])) else None
        return ReplayLoader(collector, self.replay, self._batches_per_epoch(collector))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The collectors' state, and the name of the replay's folder beside the last checkpoint."""
        state = super().state_dict()
        if self.replay is not None and self.save_replay:
            state[REPLAY] = self._save_replay()
        return state

    def _save_replay(self) -> str:
        """Every rank its own. What the last checkpoint refers to stays until that is replaced."""
        trainer, replay = self.trainer, self.replay
        assert trainer is not None
        assert replay is not None
        name = f"{REPLAY}/frames_{cast(LearnsFromWindows, trainer.lightning_module).frames}"
        folder = self._beside_checkpoints() / name
        if folder != self._saved:  # else another checkpoint of the same moment has it
            together(lambda: replay.save(self._rank_folder(folder)))
            self._saved = folder
        return name

    def _beside_checkpoints(self) -> Path:
        assert self.trainer is not None
        # The last one: `LastCheckpoint` where the command runs it, whatever other callbacks there are.
        *_, last = [None, *self.trainer.checkpoint_callbacks]
        return Path(getattr(last, "dirpath", None) or self.trainer.default_root_dir).resolve()

    def _rank_folder(self, folder: Path) -> Path:
        assert self.trainer is not None
        return folder / f"rank_{self.trainer.global_rank}"

    def after_last_checkpoint(self) -> None:
        """Deletes the replays that the newest last checkpoint does not refer to."""
        if not self.save_replay or self.replay is None:
            return
        assert self.trainer is not None
        if not self.trainer.is_global_zero:
            return
        for folder in (self._beside_checkpoints() / REPLAY).glob("frames_*"):
            if folder != self._saved:
                shutil.rmtree(folder, ignore_errors=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        assert self.trainer is not None
        if self.load_replay and REPLAY in state_dict:
            saved, here = len(state_dict["collectors"]), self.trainer.world_size
            if here < saved and self.trainer.is_global_zero:
                print(f"{saved} processes have saved a replay: this run has {here} and leaves out the others")
            self._resumed = Path(str(self.trainer.ckpt_path)).resolve().parent / state_dict[REPLAY]

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.replay = None
