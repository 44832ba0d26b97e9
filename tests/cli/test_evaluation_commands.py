"""`test`, `validate` and `predict`: a checkpoint alone is enough, and it stays as it is."""

import re

import pytest
import torch
from PIL import Image
from tensordict import TensorDict

from lit_rl import cli

EVALUATION = re.compile(
    r"evaluation: return (?P<mean>[-\d.]+) \+- (?P<std>[\d.]+), length (?P<length>[\d.]+) "
    r"\((?P<episodes>\d+) (?P<how>greedy|sampled) episodes of (?P<env>\S+)\)"
)


def evaluated(done):
    """What the one line says."""
    assert done.code == 0, done.err
    [line] = [line for line in done.out.splitlines() if line.startswith("evaluation")]
    match = EVALUATION.fullmatch(line)
    assert match, line
    return match.groupdict()


def test_a_checkpoint_alone_is_enough(lit_rl, trained, tmp_path):
    before = trained.checkpoint.read_bytes()
    said = evaluated(lit_rl("test", "--ckpt_path", trained.checkpoint))
    assert (said["episodes"], said["how"], said["env"]) == ("2", "greedy", "CartPole-v1")
    # The same agent, the same seeds: the same figures as those at the end of training.
    assert said.items() <= evaluated(trained.done).items()
    assert trained.checkpoint.read_bytes() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["test", "validate"])
def test_statistics_stand_still(command, lit_rl, trained, capsys):
    saved = torch.load(trained.checkpoint)["state_dict"]
    assert any("norms" in key for key in saved)
    run = cli.build([command, f"--ckpt_path={trained.checkpoint}", "--env.observation_noise=0.5"])
    run.run()
    state = run.model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(value, state[key]) for key, value in saved.items())


def test_episodes_and_sampling(lit_rl, trained):
    said = evaluated(lit_rl("test", "--ckpt_path", trained.checkpoint, "--episodes", "20", "--greedy=false"))
    assert (said["episodes"], said["how"]) == ("20", "sampled")
    assert float(said["std"]) > 0
    greedy = evaluated(lit_rl("test", "--ckpt_path", trained.checkpoint, "--episodes", "20"))
    assert greedy["how"] == "greedy"
    assert greedy["mean"] != said["mean"]


def test_dqn_explores_where_it_is_sampled(lit_rl):
    """As it does when training ends."""
    options = ["--env.id=CartPole-v1", "--model=LitDQN", "--data=ReplayDataModule", "--name=dqn"]
    options += ["--model.total_frames=16", "--data.frames_per_epoch=16", "--model.exploration_final=1"]
    assert lit_rl("fit", *options, "--trainer.accelerator=cpu", "--episodes=1").code == 0
    checkpoint = ("--ckpt_path", "logs/dqn/version_0/checkpoints/last.ckpt", "--episodes=20")
    greedy = evaluated(lit_rl("test", *checkpoint))
    sampled = evaluated(lit_rl("test", *checkpoint, "--greedy=false"))
    assert (greedy["how"], sampled["how"]) == ("greedy", "sampled")
    assert greedy["mean"] != sampled["mean"]


def test_validate_says_the_same_as_test(lit_rl, trained):
    options = ("--ckpt_path", trained.checkpoint, "--episodes=3")
    assert evaluated(lit_rl("validate", *options)) == evaluated(lit_rl("test", *options))


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (["--env.time_limit=5"], "CartPole-v1"),
        (["--env.time_limit", "5", "--env.observation_noise", "0.1"], "CartPole-v1"),
        (["--env.time_limit=5", "--env.id=CartPole-v0"], "CartPole-v0"),
        (["--env.time_limit=5", "--env.backend=envpool"], "CartPole-v1"),
    ],
)
def test_another_environment_with_the_same_spaces(options, env, lit_rl, trained):
    said = evaluated(lit_rl("test", "--ckpt_path", trained.checkpoint, *options))
    assert (said["length"], said["env"]) == ("5.0", env)


def test_noise_makes_a_difference(lit_rl, trained):
    options = ("--ckpt_path", trained.checkpoint, "--episodes=20")
    noisy = evaluated(lit_rl("test", *options, "--env.observation_noise=5"))
    assert noisy["mean"] != evaluated(lit_rl("test", *options))["mean"]


def test_other_spaces_are_refused(refused, trained):
    for option in ("--env.mask_velocity=true", "--env.frame_stack=2", "--env.id=Acrobot-v1"):
        line = refused("test", "--ckpt_path", trained.checkpoint, option)
        assert "the checkpoint does not fit" in line
        assert "an environment with the spaces of the run that made it" in line


@pytest.mark.parametrize("name", ["last", "best"])
def test_the_newest_checkpoint_of_a_run_or_of_all(name, lit_rl, trained, monkeypatch):
    monkeypatch.chdir(trained.folder)
    expected = evaluated(lit_rl("test", "--ckpt_path", f"logs/tiny/version_0/checkpoints/{name}.ckpt"))
    assert evaluated(lit_rl("test", "--ckpt_path", name)) == expected
    assert evaluated(lit_rl("test", f"--ckpt_path={name}", "--name=tiny")) == expected


def test_video(lit_rl, trained, tmp_path):
    done = lit_rl("test", "--ckpt_path", trained.checkpoint, "--video", "films/today")
    length = float(evaluated(done)["length"])
    assert "video: films/today/evaluation.gif" in done.out
    with Image.open(tmp_path / "films/today/evaluation.gif") as film:
        assert film.format == "GIF"
        assert film.n_frames > 1
        assert film.n_frames <= 2 * length
    assert [path.name for path in tmp_path.iterdir()] == ["films"]


def test_no_video_where_nothing_can_be_drawn(fit, lit_rl, tmp_path):
    assert fit("--env.id=lit_rl/Recall-v0", "--env.kwargs={delay: 1}").code == 0
    done = lit_rl("test", "--ckpt_path=last", "--video=films")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert "lit_rl/Recall-v0 cannot be made" in line
    assert "render_mode" in line
    assert not (tmp_path / "films").exists()


# ------------------------------------------------------------------ predict


def episodes_in(folder):
    return [TensorDict.load_memmap(path) for path in sorted(folder.iterdir())]


def check_alignment(episode, observation):
    """One whole episode: the next observation of a step is the observation of the one after."""
    L = len(episode)
    seen, seen_next = observation(episode), observation(episode["next"])
    assert torch.equal(seen_next[:-1], seen[1:])
    assert not torch.equal(seen_next[-1], seen[-1])
    ends = (episode["next", "terminated"] | episode["next", "truncated"]).squeeze(-1)
    assert ends.tolist() == [False] * (L - 1) + [True]
    assert torch.equal(ends, episode["next", "done"].squeeze(-1))
    assert episode["is_init"].squeeze(-1).tolist() == [True] + [False] * (L - 1)


def test_predict_writes_episodes(lit_rl, trained, tmp_path):
    done = lit_rl("predict", "--ckpt_path", trained.checkpoint, "--output", "data/a", "--episodes=5")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "episodes: data/a"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    episodes = episodes_in(tmp_path / "data/a")
    assert len(episodes) == 5
    for episode in episodes:
        check_alignment(episode, lambda td: td["observation"])
        assert episode["observation"].shape == (len(episode), 4)
        assert torch.equal(episode["next", "reward"], torch.ones(len(episode), 1))
        assert episode["next", "terminated"][-1]
        assert set(episode["action"].tolist()) <= {0, 1}
    lengths = [len(episode) for episode in episodes]
    said = evaluated(lit_rl("test", "--ckpt_path", trained.checkpoint, "--episodes=5"))
    assert float(said["length"]) == pytest.approx(sum(lengths) / 5, abs=0.05)


def test_predicted_episodes_are_not_kept_in_memory(trained, tmp_path):
    command = cli.build(["predict", "--ckpt_path", str(trained.checkpoint), f"--output={tmp_path / 'a'}"])
    assert command.options.return_predictions is False


def test_predicted_episodes_are_truncated_where_the_limit_is(lit_rl, trained, tmp_path):
    done = lit_rl("predict", f"--ckpt_path={trained.checkpoint}", "--output=data", "--env.time_limit=4")
    assert done.code == 0, done.err
    for episode in episodes_in(tmp_path / "data"):
        check_alignment(episode, lambda td: td["observation"])
        assert len(episode) == 4
        assert episode["next", "truncated"].squeeze(-1).tolist() == [False, False, False, True]
        assert not episode["next", "terminated"].any()


def test_predict_with_dict_observations_and_memory(fit, lit_rl, tmp_path):
    options = ["--env.id=lit_rl/Dict-v0", "--model.trunk=gru", "--model.trunk.d_model=4"]
    assert fit(*options, "--name=dict").code == 0
    assert lit_rl("predict", "--ckpt_path=last", "--output=data", "--greedy=false").code == 0
    episodes = episodes_in(tmp_path / "data")
    assert len(episodes) == 2
    for episode in episodes:
        check_alignment(episode, lambda td: td["observation", "position"])
        assert episode["observation", "cells"].shape == (8, 2)


def test_predict_refuses_a_folder_in_use(refused, trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    command = ("predict", "--ckpt_path", trained.checkpoint)
    assert "mine is not empty: give a new folder" in refused(*command, "--output", "mine")
    assert "file is a file, not a folder" in refused(*command, "--output=file")
    assert "file is a file, not a folder" in refused(*command, "--output=file/in/it")
    assert "say where with --output DIR" in refused(*command)


def test_predict_takes_an_empty_folder(lit_rl, trained, tmp_path):
    (tmp_path / "new").mkdir()
    assert lit_rl("predict", "--ckpt_path", trained.checkpoint, "--output=new").code == 0
    assert len(episodes_in(tmp_path / "new")) == 2
