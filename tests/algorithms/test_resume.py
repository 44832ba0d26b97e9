"""Checkpoints: everything comes back exactly, and what does not fit is refused in one line."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import WALK, counter, make_trainer, parameters, ppo, walk
from lightning.pytorch.callbacks import Callback

from lit_rl.algorithms import LitPPO
from lit_rl.algorithms.base import random_state, set_random_state
from lit_rl.data import RolloutDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError
from lit_rl.trunks import GRU

FRAMES = 64  # of a rollout


def learner(trunk: Any = "gru", env: EnvConfig | None = None, rollouts: int = 4) -> LitPPO:
    torch.manual_seed(0)
    make = ppo if isinstance(trunk, str) else LitPPO
    return make(
        env or walk(),
        trunk,
        total_frames=rollouts * FRAMES,
        num_minibatches=2,
        lr=1e-2,
        normalize_observation=True,
        normalize_reward=True,
    )


def data(env: EnvConfig | None = None, seed: int = 0) -> RolloutDataModule:
    return RolloutDataModule(env or walk(), rollout_length=16, frames_per_epoch=FRAMES, seed=seed)


class SaveAt(Callback):
    """Saves after the epoch (here: the rollout) number `at`, as ModelCheckpoint does, and notes what was."""

    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.frames == self.at * FRAMES:
            trainer.save_checkpoint(self.path)
            self.was = snapshot(trainer, pl_module)


class Look(Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.__dict__.setdefault("found", snapshot(trainer, pl_module))


def snapshot(trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
    """All that a resumed run must find again."""
    return {
        "weights and statistics": {key: value.clone() for key, value in module.state_dict().items()},
        "optimizer": [
            {key: value.clone() for key, value in state.items()}
            for state in trainer.optimizers[0].state_dict()["state"].values()
        ],
        "learning rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
        "frames": module.frames,
        "steps": trainer.global_step,
        "random": {kind: list(state)[kind == "numpy" :] for kind, state in random_state().items()},
        "actions": trainer.datamodule.collector.state_dict()["generator"],
        "collected": trainer.datamodule.collector.state_dict()["frames"],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SaveAt, LitPPO]:
    """A run of 4 rollouts, saved after the second."""
    path = tmp_path_factory.mktemp("run") / "half.ckpt"
    save, model = SaveAt(path, 2), learner()
    torch.manual_seed(7)
    np.random.seed(7)
    make_trainer(callbacks=[save]).fit(model, data())
    assert model.frames == 4 * FRAMES
    return path, save, model


def resume(path: Path, model: LitPPO | None = None, **options: Any) -> tuple[LitPPO, Look]:
    model, look = model or learner(), Look()
    torch.manual_seed(1234)  # another process would stand elsewhere, too
    np.random.seed(1234)
    make_trainer(callbacks=[look]).fit(model, options.get("data", data()), ckpt_path=path)
    return model, look


def test_everything_comes_back_exactly(run: tuple[Path, SaveAt, LitPPO]) -> None:
    path, save, _ = run
    _, look = resume(path)
    assert look.found.keys() == save.was.keys()
    for name, was in save.was.items():
        torch.testing.assert_close(look.found[name], was, atol=0, rtol=0, msg=name)
    assert look.found["frames"] == 2 * FRAMES
    count = look.found["weights and statistics"]["agent.norms.0.count"]
    assert count == 2 * FRAMES
    assert look.found["optimizer"][0]["step"] == 2 * 4 * 2  # rollouts, epochs, minibatches


def test_two_resumes_are_one(run: tuple[Path, SaveAt, LitPPO]) -> None:
    path, _, uninterrupted = run
    first, _ = resume(path)
    again, _ = resume(path)
    assert first.frames == again.frames == 4 * FRAMES
    assert torch.equal(parameters(first), parameters(again))
    for one, other in zip(first.buffers(), again.buffers(), strict=True):
        assert torch.equal(one, other)
    # Simulators start anew, so it is not the run that went on; but it did learn on.
    assert not torch.equal(parameters(first), parameters(uninterrupted))
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert not torch.equal(saved["agent.value_head.weight"], first.agent.value_head.weight)


def test_what_is_forgotten_would_be_seen(run: tuple[Path, SaveAt, LitPPO], tmp_path: Path) -> None:
    """Negative control: without the random states two resumes differ."""
    path, _, _ = run
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["random_state"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    whole, _ = resume(path)
    without, _ = resume(tmp_path / "without.ckpt")
    assert not torch.equal(parameters(whole), parameters(without))


def test_a_finished_run_does_not_go_on(run: tuple[Path, SaveAt, LitPPO]) -> None:
    path, _, _ = run
    model, _ = resume(path, learner(rollouts=2))
    assert model.frames == 2 * FRAMES
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(saved["agent.value_head.weight"], model.agent.value_head.weight)


def test_it_loads_with_weights_only(run: tuple[Path, SaveAt, LitPPO]) -> None:
    checkpoint = torch.load(run[0], weights_only=True)
    assert checkpoint["frames"] == 2 * FRAMES
    assert checkpoint["trunk"] == "lit_rl.trunks.recurrent.GRU"


class Lookalike(GRU):
    """Tensors of the same names and shapes, used otherwise."""


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize(
    ("trunk", "env", "named"),
    [
        ("lstm", None, r"GRU.*LSTM"),
        ("mlp", None, r"GRU.*MLP"),
        (lambda n: GRU(n, d_model=16), None, r"tensors differ"),
        (lambda n: Lookalike(n, d_model=8), None, r"GRU.*Lookalike"),
        ("gru", counter(4), r"policy"),
        ("gru", EnvConfig("lit_rl/Recall-v0", num_envs=4), r"norms"),
    ],
    ids=["lstm", "mlp", "wider", "lookalike", "other actions", "other observations"],
)
def test_what_does_not_fit_is_refused(
    run: tuple[Path, SaveAt, LitPPO], stage: str, trunk: Any, env: EnvConfig | None, named: str
) -> None:
    model = learner(trunk, env)
    before = parameters(model)
    with pytest.raises(UserError, match=named) as error:
        getattr(make_trainer(), stage)(model, datamodule=data(env), ckpt_path=run[0])
    assert "\n" not in str(error.value)
    assert torch.equal(parameters(model), before)


def test_a_sibling_environment_fits(run: tuple[Path, SaveAt, LitPPO]) -> None:
    """The same spaces: a policy may be tested where it was not trained."""
    sibling = EnvConfig(WALK, num_envs=4, kwargs={"lengths": [4]})
    trainer = make_trainer()
    trainer.test(learner(env=sibling), datamodule=data(sibling), ckpt_path=run[0], verbose=False)
    assert trainer.callback_metrics["test/length"] == 4.0


def test_random_states_of_all_three_kinds() -> None:
    import random

    def draw() -> list[float]:
        return [random.random(), np.random.normal(), torch.rand(()).item()]

    np.random.normal()  # an odd number of normals: half a pair is part of the state
    state = random_state()
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first
