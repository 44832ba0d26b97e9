"""Whatever is wrong with off-policy options or a saved replay: one line, exit code 2, nothing written."""

import contextlib
import re
import shutil
from math import nan

import pytest
from cli_helpers import CARTPOLE, listing, run

from lit_rl import checkpoints
from lit_rl.algorithms import LitDQN
from lit_rl.data import ReplayDataModule
from lit_rl.envs import EnvConfig
from lit_rl.errors import UserError

# 3 blocks of 2 environments x 8 steps: 16 frames each, an epoch each.
DQN = (
    "--env.id=CartPole-v1",
    "--env.num_envs=2",
    "--trainer.accelerator=cpu",
    "--episodes=1",
    "--name=it",
    "--model=LitDQN",
    "--model.total_frames=48",
    "--model.learning_starts=16",
    "--model.window=4",
    "--model.batch_size=4",
    "--model.trunk=lstm",
    "--model.trunk.d_model=8",
    "--model.context=stored",
)
REPLAY = (
    "--data=ReplayDataModule",
    "--data.steps_per_block=8",
    "--data.buffer_size=200",
    "--data.frames_per_epoch=16",
)
GOING_ON = ("--data.priority_exponent=0.6", "--model.total_frames=64", "--ckpt_path=last")
LAST = "logs/it/version_0/checkpoints/last.ckpt"


@pytest.fixture
def refused_dqn(refused):
    """The line for a tiny `fit` of DQN with more options."""
    return lambda *options: refused("fit", *DQN, *REPLAY, *options)


# ------------------------------------------------------------------ what does not fit together


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "lit_rl/MultiDiscrete-v0"])
def test_actions_that_are_not_discrete(refused_dqn, env_id):
    line = refused_dqn(f"--env.id={env_id}")
    assert "LitDQN chooses among discrete actions, not in " in line
    assert line.endswith("use LitPPO")


def test_learners_and_data_of_different_kinds(refused):
    line = refused("fit", *DQN, "--data=RolloutDataModule")
    assert "LitDQN learns from a replay, not from RolloutDataModule: use ReplayDataModule" in line
    line = refused("fit", "--config", CARTPOLE, *REPLAY)
    assert "LitPPO" in line
    assert "use RolloutDataModule" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.window=501", "--data.buffer_size=10000"],
            "a window of 501 steps is longer than an episode of CartPole-v1 (500): shorten it",
        ),
        (
            ["--model.window=31", "--env.time_limit=30"],
            "a window of 31 steps is longer than an episode of CartPole-v1 (30): shorten it",
        ),
        (
            ["--model.window=31", "--env.id=highway-fast-v0"],
            "a window of 31 steps is longer than an episode of highway-fast-v0 (30): shorten it",
        ),
        (
            ["--model.window=100", "--model.n_step=101"],
            "a window of 100 + 101 steps is longer than the replay (200 steps): shorten it or raise",
        ),
        (["--model.burn_in=4"], "burn_in is 4 and the window 4 steps: leave steps to learn from"),
        (
            ["--model.window=1", "--model.context=window"],
            "with windows of 1 step that begin without memory the trunk has none: set window, or context",
        ),
        (["--model.loss_steps=0"], "loss_steps is 0: it must be from 1 to the 4 steps behind burn_in"),
        (
            ["--model.batch_size=51"],
            "a replay of 50 windows is smaller than a batch of 51: raise buffer_size",
        ),
        (["--data.stride=5"], "stride 5 would leave out steps: a window learns from 4; make it at most that"),
        (["--model.latent_priority=0.5"], "latent_priority and latent_targets need stored latents: set"),
        (
            [
                "--model.head=lit_rl.models.q_heads.CategoricalQ",
                "--model.head.v_min=1",
                "--model.head.v_max=1",
            ],
            "v_min is 1.0 and v_max is 1.0: give two finite returns",
        ),
    ],
)
def test_sizes_that_do_not_fit(refused_dqn, options, message):
    assert message in refused_dqn(*options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (LitDQN, {"window": 0}, "window is 0: it must be at least 1"),
        (LitDQN, {"n_step": 0}, "n_step is 0: it must be at least 1"),
        (LitDQN, {"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        (LitDQN, {"updates_per_block": 0}, "updates_per_block is 0: it must be at least 1"),
        (LitDQN, {"learning_starts": -1}, "learning_starts is -1: it must be at least 0"),
        (LitDQN, {"target_update_frames": 0}, "target_update_frames is 0: it must be at least 1"),
        (LitDQN, {"tau": 0.0}, "tau is 0.0: it must be above 0"),
        (LitDQN, {"tau": 1.5}, "tau is 1.5: it must be at least 0 and at most 1"),
        (LitDQN, {"gamma": 1.5}, "gamma is 1.5: it must be at least 0 and at most 1"),
        (
            LitDQN,
            {"exploration_initial": 2.0},
            "exploration_initial is 2.0: it must be at least 0 and at most 1",
        ),
        (LitDQN, {"exploration_frames": 0}, "exploration_frames is 0: it must be at least 1"),
        (LitDQN, {"beta": -1.0}, "beta is -1.0: it must be at least 0 and at most 1"),
        (LitDQN, {"priority_clip": 0}, "priority_clip is 0: it must be above 0"),
        (LitDQN, {"priority_eta": 1.1}, "priority_eta is 1.1: it must be at least 0 and at most 1"),
        (LitDQN, {"weight_decay": -1.0}, "weight_decay is -1.0: it must be at least 0"),
        (LitDQN, {"lr": nan}, "lr is nan: it must be at least 0 and finite"),
        (
            LitDQN,
            {"window": 4, "burn_in": 4},
            "burn_in is 4 and the window 4 steps: leave steps to learn from",
        ),
        (LitDQN, {"window": 4, "burn_in": -1}, "burn_in is -1 and the window 4 steps"),
        (LitDQN, {"window": 4, "loss_steps": 0}, "loss_steps is 0: it must be from 1 to the 4 steps behind"),
        (LitDQN, {"window": 4, "loss_steps": 4, "burn_in": 1}, "loss_steps is 4: it must be from 1 to the 3"),
        (LitDQN, {"latent_priority": 0.5}, "latent_priority and latent_targets need stored latents: set"),
        (LitDQN, {"latent_targets": True}, "latent_priority and latent_targets need stored latents: set"),
        (ReplayDataModule, {"steps_per_block": 0}, "steps_per_block is 0: it must be at least 1"),
        (ReplayDataModule, {"buffer_size": 0}, "buffer_size is 0: it must be at least 1"),
        (ReplayDataModule, {"stride": 0}, "stride is 0: it must be at least 1"),
        (ReplayDataModule, {"priority_exponent": -0.5}, "priority_exponent is -0.5: it must be at least 0"),
        (ReplayDataModule, {"priority_exponent": nan}, "priority_exponent is nan: it must be at least 0"),
        (
            ReplayDataModule,
            {"priority_exponent": 1.5},
            "priority_exponent is 1.5: it must be at least 0 and at most 1",
        ),
        (ReplayDataModule, {"frames_per_epoch": 0}, "frames_per_epoch is 0: it must be at least 1"),
    ],
)
def test_values_out_of_range(make, options, message):
    """By the classes themselves; that the command makes a line of it is shown above and below."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make(EnvConfig("CartPole-v1"), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.window=x", "model.window takes int, not x"),
        ("--model.context=x", "model.context takes window or stored, not x"),
        ("--model.exploration=x", "model.exploration takes epsilon_greedy or softmax, not x"),
        ("--model.loss_steps=x", "model.loss_steps takes int or null, not x"),
        ("--model.double=x", "model.double takes bool, not x"),
        ("--model.windw=3", "there is no option model.windw, did you mean window?"),
        ("--model.head=x", "model.head"),
        ("--model.head.dueling=true", "model.head: name the class first, --model.head NAME"),
        ("--data.stride=x", "data.stride takes int or null, not x"),
        ("--data.storage=x", "data.storage takes memory or disk, not x"),
        ("--data.save_replay=x", "data.save_replay takes bool, not x"),
        ("--data.priority_exponent=x", "data.priority_exponent takes float, not x"),
        ("--data.buffer_siz=3", "there is no option data.buffer_siz, did you mean buffer_size?"),
    ],
)
def test_wrong_types_and_names(refused_dqn, option, message):
    assert message in refused_dqn(option)


def test_options_that_a_head_does_not_have(refused_dqn):
    line = refused_dqn("--model.head=ExpectedQ", "--model.head.x=1")
    assert "there is no option model.head.x, but dueling, hidden, loss" in line


# ------------------------------------------------------------------ a saved replay


@pytest.fixture(scope="session")
def trained_dqn(tmp_path_factory):
    """A run without a fault."""
    folder = tmp_path_factory.mktemp("trained_dqn")
    with contextlib.chdir(folder):
        done = run("fit", *DQN, *REPLAY, "--data.priority_exponent=0.6")
    assert done.code == 0, done.err
    return folder


def kept(folder):
    """All but TensorBoard's events: Lightning opens a file for them before it asks for data."""
    return {name: content for name, content in listing(folder).items() if "tfevents" not in name}


@pytest.fixture
def go_on(trained_dqn, lit_rl, tmp_path):
    """The line for going on from a copy of a run, with more options, which must be refused."""
    shutil.copytree(trained_dqn / "logs", tmp_path / "logs")

    def refuse(*options):
        before = kept(tmp_path)
        done = lit_rl("fit", *DQN, *REPLAY, *GOING_ON, *options)
        assert done.code == 2, done
        [line] = done.err.splitlines()
        assert line.startswith("lit-rl: error: ")
        assert "Traceback" not in done.out
        assert kept(tmp_path) == before
        return line

    return refuse


@pytest.fixture
def saved(go_on, tmp_path):
    """The folder of the replay that it goes on with."""
    [folder] = (tmp_path / "logs/it/version_0/checkpoints/replay").iterdir()
    return folder / "rank_0"


def without_replay(lit_rl, *options):
    return lit_rl("fit", *DQN, *REPLAY, *GOING_ON, *options, "--data.load_replay=false")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.buffer_size=400"], "data.buffer_size is 200 there and 400 in this run"),
        (["--data.stride=2"], "data.stride is 4 there and 2 in this run"),
        (["--model.window=3"], "model.window is 4 there and 3 in this run"),
        (["--model.n_step=2"], "model.n_step is 1 there and 2 in this run"),
        (["--model.burn_in=1"], "steps with a loss is 4 there and 3 in this run"),
        (["--model.latents=true"], "latents are kept is False there and True in this run"),
        (["--model.context=window"], "memory is kept is True there and False in this run"),
        (["--data.priority_exponent=0"], "prioritized is True there and False in this run"),
    ],
)
def test_a_replay_of_other_windows(go_on, saved, options, message):
    line = go_on(*options)
    assert f"the replay at {saved} holds other windows: " in line
    assert message in line
    assert line.endswith("or go on with an empty replay: --data.load_replay false")


def test_a_replay_that_is_gone(go_on, saved, lit_rl):
    shutil.rmtree(saved.parent)
    line = go_on()
    assert f"no whole replay at {saved}: start anew without --ckpt_path, or go on with an empty" in line
    assert without_replay(lit_rl).code == 0  # as the line says


def test_a_replay_cut_off(go_on, saved, lit_rl):
    for name in ("steps.reward.npy", "sampler/sumtree.memmap", "windows.json"):
        path = saved / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert f"the replay at {saved} is damaged (" in go_on()
        path.write_bytes(whole)
    path.unlink()
    assert f"no whole replay at {saved}" in go_on()
    assert without_replay(lit_rl, "--model.window=3").code == 0


def test_a_checkpoint_of_ppo(refused, trained, trained_dqn, tmp_path):
    line = refused("fit", *DQN, *REPLAY, "--ckpt_path", trained.checkpoint)
    assert "the checkpoint does not fit: it is of LitPPO, this run of LitDQN: set --model" in line
    line = refused("fit", "--config", CARTPOLE, "--ckpt_path", trained_dqn / LAST)
    assert "the checkpoint does not fit" in line


# ------------------------------------------------------------------ while running


def test_a_full_disk_spares_the_checkpoint(trained_dqn, lit_rl, tmp_path, monkeypatch):
    """The replay cannot be written: the checkpoint before it stays, with its replay, and loads."""
    shutil.copytree(trained_dqn / "logs", tmp_path / "logs")
    before = (tmp_path / LAST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        done = lit_rl("fit", *DQN, *REPLAY, *GOING_ON)
    assert done.code == 2
    [line] = done.err.splitlines()
    assert "cannot write the replay to " in line
    assert "make room, then go on with --ckpt_path last, or do without it: --data.save_replay false" in line
    assert (tmp_path / LAST).read_bytes() == before
    done = lit_rl("fit", *DQN, *REPLAY, *GOING_ON)
    assert done.code == 0, done.err
    assert checkpoints.load(tmp_path / LAST)["frames"] == 64
    assert [path.name for path in (tmp_path / LAST).parent.joinpath("replay").iterdir()] == ["frames_64"]
