"""Attention maps: what a trunk offers lands in TensorBoard, at the frames of its evaluation."""

import io
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers import counter, make_trainer, small
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDict
from torch import Tensor

from lit_rl import cli
from lit_rl.algorithms import LitDQN, LitPPO
from lit_rl.callbacks import AttentionMaps, attention
from lit_rl.data import ReplayDataModule, RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.models.agent import TrunkFactory
from lit_rl.trunks import GRU, Trunk

torch.set_num_threads(1)


class Attentive(Trunk):
    """Memoryless, but for what it says it attends to: every earlier step alike, in each of two layers."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, out_features=4)
        self.project = torch.nn.Linear(in_features, 4)
        self.asked: list[tuple[Tensor, TensorDict, Tensor]] = []

    def initial_state(self, batch_size: int) -> TensorDict:
        return TensorDict(batch_size=[batch_size])

    def forward(self, x: Tensor, state: TensorDict, is_init: Tensor) -> tuple[Tensor, TensorDict]:
        return self.project(x), state

    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        self.asked.append((x, state, is_init))
        T = x.shape[1]
        return [torch.ones(len(x), T, T).tril() / torch.arange(1, T + 1)[:, None]] * 2


class Inattentive(Attentive):
    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        return []


def fit(folder: Path, trunk: TrunkFactory, env: EnvConfig, callback: L.Callback, **options: object) -> LitPPO:
    """Two rollouts of 32 frames, an evaluation of six episodes after each."""
    model = LitPPO(env, trunk, total_frames=64, num_minibatches=2)
    data = RolloutDataModule(env, rollout_length=16, frames_per_epoch=32, episodes=6)
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = make_trainer(logger=logger, limit_val_batches=1.0, callbacks=[callback], **options)
    trainer.fit(model, data)
    logger.experiment.flush()
    return model


def images(folder: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_an_image_for_each_evaluation(tmp_path: Path) -> None:
    """The maps are asked for once an evaluation, for the whole first episode of environment 0 and no more."""
    env = counter(num_envs=2, lengths=[5, 3])
    model = fit(tmp_path, Attentive, env, AttentionMaps(), num_sanity_val_steps=2)
    assert images(tmp_path) == {"attention": [32, 64]}
    for x, state, is_init in model.agent.trunk.asked:
        assert x.tolist() == [[[0.0, t] for t in range(5)]]  # a Counter shows (episode, t)
        assert state.batch_size == (1,)
        assert not is_init.any()
    assert len(model.agent.trunk.asked) == 2
    assert not model.agent.trunk._forward_pre_hooks


class Remembering(GRU):
    """Says that it attends to what it is given of the episode, to each step as much as that shows."""

    def attention_maps(self, x: Tensor, state: TensorDict, is_init: Tensor) -> list[Tensor]:
        episode = is_init.cumsum(1)
        return [(episode[:, :, None] == episode[:, None]).tril() * x[:, None, :, 1]]


def test_agents_that_act_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step's row is of the steps that acting saw: its own and the two before, within the episode."""
    drawn: list[list[list[float]]] = []
    monkeypatch.setattr(attention, "draw", lambda maps: drawn.append(maps[0].tolist()) or Figure())
    env = counter(num_envs=2, lengths=[5, 3])
    model = LitDQN(env, Remembering, total_frames=64, window=3, batch_size=4, learning_starts=0)
    data = ReplayDataModule(env, frames_per_epoch=32, episodes=6, save_replay=False)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    make_trainer(logger=logger, limit_val_batches=1.0, callbacks=[AttentionMaps()]).fit(model, data)
    seen = [[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 2, 0, 0], [0, 1, 2, 3, 0], [0, 0, 2, 3, 4]]
    assert drawn == [seen, seen]  # an observation is (episode, t)
    assert not model.agent.acting_trunk._forward_pre_hooks


def test_long_episodes_are_cut(tmp_path: Path) -> None:
    model = fit(tmp_path, Attentive, counter(num_envs=2, lengths=[9]), AttentionMaps(max_steps=4))
    assert [x.shape[1] for x, _, _ in model.agent.trunk.asked] == [4, 4]


@pytest.mark.parametrize("trunk", [small("mlp"), small("gru"), Inattentive])
def test_nothing_of_trunks_without_maps(trunk: TrunkFactory, tmp_path: Path) -> None:
    fit(tmp_path, trunk, counter(num_envs=2), AttentionMaps())
    assert images(tmp_path) == {}


def test_the_picture_shows_the_layers_side_by_side(tmp_path: Path) -> None:
    fit(tmp_path, Attentive, counter(num_envs=2), AttentionMaps())
    event = EventAccumulator(str(tmp_path)).Reload().Images("attention")[-1]
    picture = Image.open(io.BytesIO(event.encoded_image_string))
    assert picture.width > 1.8 * picture.height  # two panels
    assert len(np.unique(np.asarray(picture).reshape(-1, np.asarray(picture).shape[-1]), axis=0)) > 10


def test_every_run_of_the_command_line_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = cli.build(["fit", "--trainer.enable_progress_bar=false"])
    assert any(isinstance(callback, AttentionMaps) for callback in run.trainer.callbacks)
