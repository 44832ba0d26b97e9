"""Whatever is wrong is said in one line with exit code 2, and nothing is written."""

import os
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from cli_helpers import CARTPOLE, TINY
from gymnasium import spaces
from lightning.pytorch.utilities.exceptions import SIGTERMException

# ------------------------------------------------------------------ trunks


def test_unknown_trunk(refused_fit, refused, tmp_path):
    expected = "unknown trunk 'grru'; did you mean gru"
    assert expected in refused_fit("--model.trunk=grru")
    assert expected in refused_fit("--model.trunk.class_path", "grru")
    (tmp_path / "x.yaml").write_text("model: {class_path: LitPPO, init_args: {trunk: grru}}")
    assert expected in refused("fit", "--config=x.yaml")
    assert expected in refused("fit", "--model.trunk.help=grru")


def test_options_of_a_class_that_is_not_named(refused):
    line = refused("fit", "--model.trunk.d_model", "8")
    assert "model.trunk: name the class first, --model.trunk NAME --model.trunk.d_model ..." in line


@pytest.fixture
def plugins(tmp_path_factory, monkeypatch):
    """A package with broken trunks and one whose trunk bears a name of another's."""
    site = tmp_path_factory.mktemp("site")
    (site / "odd_trunks.py").write_text("raise RuntimeError('two\\nlines')")
    (site / "own_trunks.py").write_text("from lit_rl.trunks import MLP\nclass Own(MLP): pass\n")
    for package, entries in (
        ("odd", "raises = odd_trunks:A\nmissing = no_such_module:A\nnot_one = json:dumps"),
        ("own", "gru = own_trunks:Own"),
    ):
        info = site / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[lit_rl.trunks]\n{entries}\n")
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gru", "trunk 'gru' is offered by lit-rl 0.1.0 and own 1.2; write lit-rl/gru or own/gru"),
        ("raises", "'raises' of odd 1.2 (odd_trunks:A) cannot be imported: RuntimeError: two lines; repair"),
        ("missing", "'missing' of odd 1.2 (no_such_module:A) cannot be imported: ModuleNotFoundError"),
        ("not_one", "it does not subclass lit_rl.trunks.base.Trunk"),
        ("torch.nn.Linear", "it does not subclass lit_rl.trunks.base.Trunk"),
        ("lit_rl.trunks.Nothing", "module 'lit_rl.trunks' has no attribute 'Nothing'"),
    ],
)
def test_ambiguous_and_broken_trunks(refused_fit, name, message):
    assert message in refused_fit(f"--model.trunk={name}")


@pytest.mark.usefixtures("plugins")
def test_an_ambiguous_trunk_can_be_selected(fit):
    assert fit("--model.trunk=own/gru").code == 0


# ------------------------------------------------------------------ environments


class Odd(gym.Env):
    """Spaces as told."""

    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
ODD = {
    "Empty": (spaces.Box(0, 1, (0,)), spaces.Discrete(2), "unsupported observation space: Box"),
    "EmptyDict": (spaces.Dict(), spaces.Discrete(2), "unsupported observation space: Dict"),
    "Text": (spaces.Text(5), spaces.Discrete(2), "unsupported observation space: Text"),
    "Tuple": (spaces.Tuple([BOX, BOX]), spaces.Discrete(2), "unsupported observation space: Tuple"),
    "Nested": (spaces.Dict(a=spaces.Dict(b=BOX)), spaces.Discrete(2), "unsupported observation space 'a'"),
    "Action": (BOX, spaces.Dict(a=BOX), "unsupported action space: Dict"),
    "Boundless": (BOX, spaces.Box(-np.inf, np.inf, (1,), np.float32), ""),
}


@pytest.fixture(autouse=True)
def _odd_environments():
    for name, (observation, action, _) in ODD.items():
        kwargs = {"observation": observation, "action": action}
        gym.register(f"Odd{name}-v0", entry_point=Odd, kwargs=kwargs)
    yield
    for name in ODD:
        del gym.registry[f"Odd{name}-v0"]


@pytest.mark.parametrize("name", [name for name, (*_, message) in ODD.items() if message])
def test_unsupported_spaces(refused_fit, name):
    line = refused_fit(f"--env.id=Odd{name}-v0")
    assert ODD[name][-1] in line
    assert "supported: " in line
    assert "Convert it with a wrapper in env.wrappers" in line


def test_unknown_environment(refused_fit):
    assert "unknown environment 'CartPol-v1' (backend gymnasium): did you mean CartPole-v1" in refused_fit(
        "--env.id=CartPol-v1"
    )
    assert "(backend envpool): did you mean CartPole-v1" in refused_fit(
        "--env.id=CartPol-v1", "--env.backend=envpool"
    )


def test_missing_extras_name_the_pip_command(refused_fit, monkeypatch):
    for module in ("envpool", "ale_py"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'lit-rl[envpool]'" in refused_fit("--env.backend=envpool")
    assert "pip install 'lit-rl[atari]'" in refused_fit("--env.id=ALE/Pong-v5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--env.id=OddBoundless-v0", "--model.squash=true"],
            "has no bounds to squash to: set squash to false",
        ),
        (["--model.squash=true"], "squash and log_std are for continuous actions, not Discrete(2)"),
        (["--model.log_std=-1"], "squash and log_std are for continuous actions, not Discrete(2)"),
        (["--env.kwargs={nope: 1}"], "unexpected keyword argument 'nope'"),
        (["--env.wrappers=[no.such.Wrapper]"], "env.wrappers: cannot import 'no.such.Wrapper'"),
        (["--env.actions=[0, 7]"], "env.actions [0, 7]: CartPole-v1 takes 0 to 1"),
        (["--env.id=Pendulum-v1", "--env.actions=[0]"], "env.actions chooses from a Discrete space"),
        (["--env.view_size=3"], "env.view_size is for MiniGrid"),
        (["--env.id=lit_rl/Recall-v0", "--env.mask_velocity=true"], "knows no velocities"),
        (["--env.backend=envpool", "--env.vectorization=async"], "EnvPool has its own threads"),
    ],
)
def test_options_that_the_environment_does_not_have(refused_fit, options, message):
    assert message in refused_fit(*options)


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--env.num_env=3", "there is no option env.num_env, did you mean num_envs"),
        ("--env.nope=3", "there is no option env.nope; see lit-rl fit --help"),
        ("--model.gama=1", "there is no option model.gama, did you mean gamma?"),
        ("--model.init_args.gama=1", "there is no option model.gama, did you mean gamma?"),
        ("--model.trunk.d_modl=1", "there is no option model.trunk.d_modl, did you mean d_model?"),
        ("--model.trunk.x=1", "there is no option model.trunk.x, but d_model, n_layers, activation"),
        ("--data.rollout_lengt=1", "there is no option data.rollout_lengt, did you mean rollout_length?"),
        ("--trainer.max_epoch=1", "there is no option trainer.max_epoch, did you mean max_epochs"),
        (
            "--data.frames_per_epohc=1",
            "there is no option data.frames_per_epohc, did you mean frames_per_epoch",
        ),
        ("--data.options=1", "there is no option data.options"),
        ("--model=LitSAC", "model: there is no class LitSAC: choose LitPPO or LitDQN, or give"),
        ("--trainer.gradient_clip_val=1", "trainer.gradient_clip_val is not for algorithms that step by"),
        ("--trainer.accumulate_grad_batches=2", "set the size of the model's minibatches"),
        ("--trainer.reload_dataloaders_every_n_epochs=1", "would begin the environments anew each time"),
        ("--data.launcher=ray", "launcher ray has no workers to launch: set num_workers"),
        ("--env.id=LunarLander-v2", "LunarLander-v2 cannot be made: "),
        ("--nope", "there is no option nope"),
        ("stray", "there is no option stray"),
        ("--episode=3", "there is no option episode"),
        ("--print_conf", "there is no option print_conf"),
        ("--env.num_envs=x", "env.num_envs takes int, not x"),
        ("--env.num_envs=1.5", "env.num_envs takes int, not 1.5"),
        ("--env.backend=x", "env.backend takes gymnasium or envpool, not x"),
        ("--env.time_limit=x", "env.time_limit takes int or null, not x"),
        ("--env.kwargs=3", "env.kwargs takes dict, not 3"),
        ("--model.gamma=x", "model.gamma takes float, not x"),
        ("--model.clip_final=x", "model.clip_final takes float or null, not x"),
        ("--model.value_trunk=x", "model.value_trunk takes shared or separate, not x"),
        ("--model.trunk.d_model=x", "model.trunk.d_model takes int, not x"),
        ("--model.trunk.activation=x", "model.trunk.activation takes tanh or relu or silu or gelu, not x"),
        ("--model=DQN", "model: there is no class DQN"),
        ("--data.rollout_length=x", "data.rollout_length takes int, not x"),
        ("--trainer.max_epochs=x", "trainer.max_epochs takes int or null, not x"),
        ("--trainer.accelerator=x", "invalid accelerator name"),
        ("--trainer.precision=64-true", "precision 64-true is not supported: use 32-true or bf16-mixed"),
        ("--trainer.strategy=fsdp", "strategy `fsdp` requires a GPU"),
        ("--trainer.strategy=ddp_spawn", "keep what became of a run to themselves: set --trainer"),
        ("--episodes=x", "episodes takes int, not x"),
        ("--greedy=x", "greedy takes bool, not x"),
        ("--seed_everything=x", "seed_everything takes int, not x"),
        ("--model.gamma=null", "model.gamma takes float, not null"),
        ("--env.num_envs=null", "env.num_envs takes int, not null"),
        ("--model.trunk.d_model=null", "model.trunk.d_model takes int, not null"),
        ("--torch_threads=null", "torch_threads takes int, not null"),
        ("--model.env.num_envs=3", "model.env.num_envs is taken from env: set env.num_envs instead"),
        ("--data.init_args.seed=3", "data.seed is taken from seed_everything"),
        ("--name=", "name is empty: give the name of a folder in logs/"),
        ("--model.trunk=", "model.trunk is empty: lit-rl trunks list names those there are"),
        ("--name=../elsewhere", "name '../elsewhere' leads out of logs/"),
        ("--video=x", "--video is an option of test"),
        ("--output=x", "--output is an option of predict"),
    ],
)
def test_unknown_options_and_wrong_types(refused_fit, option, message):
    assert message in refused_fit(option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--env.num_envs=0", "env.num_envs is 0: it must be at least 1"),
        ("--env.num_envs=1000000000000", "it must be at least 1 and at most 65536"),
        ("--env.time_limit=0", "env.time_limit is 0: it must be at least 1"),
        ("--env.frame_stack=0", "env.frame_stack is 0: it must be at least 1"),
        ("--env.observation_noise=-1", "env.observation_noise is -1.0: it must be at least 0"),
        ("--env.observation_noise=.nan", "env.observation_noise is nan: it must be at least 0 and finite"),
        ("--episodes=0", "episodes is 0: it must be at least 1"),
        ("--torch_threads=0", "torch_threads is 0: it must be at least 1"),
        ("--seed_everything=-1", "seed_everything is -1: it must be at least 0"),
        ("--data.evaluation_seed=-1", "evaluation_seed is -1: it must be at least 0"),
        ("--data.rollout_length=0", "rollout_length is 0: it must be at least 1"),
        ("--data.frames_per_epoch=-5", "frames_per_epoch is -5: it must be at least 1"),
        ("--data.sequence_length=0", "sequence_length 0 does not divide rollout_length 16"),
        ("--data.sequence_length=5", "sequence_length 5 does not divide rollout_length 16"),
        ("--model.total_frames=0", "total_frames is 0: it must be at least 1"),
        ("--model.num_epochs=0", "num_epochs is 0: it must be at least 1"),
        ("--model.num_minibatches=0", "num_minibatches is 0: it must be at least 1"),
        (
            "--model.num_minibatches=5",
            "a rollout is 32 steps (2 x 16): they do not divide into 5 minibatches",
        ),
        ("--model.gamma=1.5", "gamma is 1.5: it must be at least 0 and at most 1"),
        ("--model.gae_lambda=-0.1", "gae_lambda is -0.1: it must be at least 0 and at most 1"),
        ("--model.clip=0", "clip is 0.0: it must be above 0"),
        ("--model.value_clip=-1", "value_clip is -1.0: it must be above 0"),
        ("--model.max_grad_norm=0", "max_grad_norm is 0.0: it must be above 0"),
        ("--model.target_kl=0", "target_kl is 0.0: it must be above 0"),
        ("--model.lr=-1", "lr is -1.0: it must be at least 0"),
        ("--model.lr=.inf", "lr is inf: it must be at least 0 and finite"),
        ("--model.trunk_lr=-1", "trunk_lr is -1.0: it must be at least 0"),
        ("--model.encoder_width=0", "encoder_width is 0: it must be at least 1"),
        ("--model.trunk.d_model=0", "the trunk cannot be built (ValueError: d_model must be at least 1"),
        ("--model.trunk.n_layers=-2", "the trunk cannot be built (ValueError: n_layers must be at least 1"),
    ],
)
def test_values_out_of_range(refused_fit, option, message):
    assert message in refused_fit(option)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nope", 3, "there is no option nope"),
        ("env.num_env", 3, "there is no option env.num_env, did you mean num_envs"),
        ("env.num_envs", "x", "env.num_envs takes int, not x"),
        ("env", None, "env takes options with their values, not null"),
        ("trainer", 3, "trainer takes options with their values, not 3"),
        ("trainer.max_epoch", 3, "there is no option trainer.max_epoch, did you mean max_epochs"),
        ("model", 3, "model takes LitAgent"),
        ("model.class_path", "DQN", "model: there is no class DQN"),
        ("model.init_args.gama", 3, "there is no option model.gama, did you mean gamma?"),
        ("model.init_args.gamma", [1], "model.gamma takes float, not [1]"),
        ("model.init_args.gamma", None, "model.gamma takes float, not null"),
        ("model.init_args.env", {"num_envs": 4}, "model.env is taken from env"),
        ("model.init_args.trunk", 3, "model.trunk: Expected an import path or a subclass spec, but got 3"),
        ("model.init_args.trunk", {"class_path": "gru", "init_args": {"d_modl": 3}}, "did you mean d_model?"),
        ("data.init_args.rollout_length", "x", "data.rollout_length takes int, not x"),
        ("data.init_args.greedy", False, "data.greedy is taken from greedy"),
        ("seed_everything", True, "seed_everything takes int, not True"),
        ("name", ["a"], "name takes str, not ['a']"),
    ],
)
def test_faults_in_yaml(refused, tmp_path, key, value, message):
    tree = yaml.safe_load(CARTPOLE.read_text())
    *sections, last = key.split(".")
    place = tree
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    (tmp_path / "faulty.yaml").write_text(yaml.safe_dump(tree))
    line = refused("fit", "--config", "faulty.yaml")
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "bad.yaml is no valid YAML: while parsing a flow node"),
        (b"a: b: c", "bad.yaml is no valid YAML: mapping values are not allowed in this context, line 1"),
        (b"model: *nowhere", "bad.yaml is no valid YAML: found undefined alias"),
        (
            b"!!python/object/apply:os.getcwd []",
            "bad.yaml is no valid YAML: could not determine a constructor",
        ),
        (b"- a\n- b", "bad.yaml does not hold options with their values: - a - b"),
        (b"17", "bad.yaml does not hold options with their values: 17"),
        (b"", "bad.yaml does not hold options with their values"),
        (b"\xff\xfe\x00", "bad.yaml is not UTF-8 text"),
        (b"\x00", "bad.yaml is no valid YAML: unacceptable character"),
    ],
)
def test_files_that_hold_no_configuration(refused, tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    assert message in refused("fit", "--config=bad.yaml")


def test_configuration_files_that_are_not_there(refused, tmp_path):
    assert "File does not exist" in refused("fit", "--config=nowhere.yaml")
    (tmp_path / "folder").mkdir()
    assert "not a file" in refused("fit", "--config", "folder")
    assert "expected one argument" in refused("fit", "--config")


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("command", ["test", "fit"])
@pytest.mark.parametrize(
    ("option", "difference"),
    [
        (
            "--model.trunk=gru",
            "it holds trunk lit_rl.trunks.mlp.MLP, this run builds lit_rl.trunks.recurrent.GRU",
        ),
        ("--model.trunk.d_model=8", "(checkpoint [2, 64], run [2, 8])"),
        ("--env.id=Acrobot-v1", "(checkpoint [4], run [6])"),
        ("--model.normalize_observation=false", "(checkpoint [4], run has none)"),
    ],
)
def test_a_checkpoint_of_another_agent(refused, trained, command, option, difference):
    config = ["--config", CARTPOLE, *TINY, "--model.normalize_observation=true"] if command == "fit" else []
    line = refused(command, *config, "--ckpt_path", trained.checkpoint, option)
    assert "the checkpoint does not fit" in line
    assert difference in line


def damaged(whole):
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    return {
        "empty": b"",
        "text": b"hello",
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(flipped),
    }


@pytest.mark.parametrize("command", ["test", "validate", "predict", "fit"])
def test_damaged_checkpoints(refused, trained, command, tmp_path):
    config = ["--config", CARTPOLE, *TINY] if command == "fit" else []
    config += ["--output=data"] if command == "predict" else []
    for name, content in damaged(trained.checkpoint.read_bytes()).items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        line = refused(command, *config, "--ckpt_path", path)
        assert f"{name}.ckpt is not a whole checkpoint (truncated or corrupt): use another" in line
    for name, content in {"other": {"a": 1}, "weights": {"state_dict": {}}, "list": [1]}.items():
        path = tmp_path / f"{name}.ckpt"
        torch.save(content, path)
        line = refused(command, *config, f"--ckpt_path={path}")
        assert f"{name}.ckpt holds no Lightning checkpoint" in line
    torch.save(Odd, tmp_path / "code.ckpt")  # refused, not run
    assert "code.ckpt cannot be read as a checkpoint" in refused(command, *config, "--ckpt_path=code.ckpt")
    for place in ("nowhere.ckpt", tmp_path):
        assert f"no checkpoint at {place}" in refused(command, *config, "--ckpt_path", place)


def test_no_checkpoint_given(refused):
    for command in ("test", "validate", "predict"):
        assert f"{command} needs a trained agent: give --ckpt_path P" in refused(command)
        assert "no checkpoint at ." in refused(command, "--ckpt_path")
        assert "no whole checkpoint under logs: train one" in refused(command, "--ckpt_path=last")
        assert "no whole checkpoint under logs/x: train one" in refused(
            command, "--ckpt_path=best", "--name=x"
        )


# ------------------------------------------------------------------ while running


def last_checkpoint(folder):
    [path] = folder.glob("logs/*/version_0/checkpoints/last.ckpt")
    return path


def finite(path):
    weights = torch.load(path)["state_dict"].values()
    return all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "Fault",
            "Fault-v0: environment 0 failed in step() after 40 steps (RuntimeError: the simulator fell over)",
        ),
        ("NaN", "observation of environment 0 of lit_rl/NaN-v0 is not finite at step 41"),
    ],
)
def test_a_faulty_environment_costs_no_checkpoint(fit, lit_rl, tmp_path, name, message):
    done = fit(
        f"--env.id=lit_rl/{name}-v0",
        "--env.kwargs={after: 40}",
        "--model.total_frames=320",
        "--trainer.limit_val_batches=0",
    )
    assert done.code == 2
    [line] = done.err.splitlines()
    assert line.startswith("lit-rl: error: ")
    assert message in line
    checkpoint = last_checkpoint(tmp_path)
    assert torch.load(checkpoint)["frames"] == 64
    assert finite(checkpoint)
    done = lit_rl("test", "--ckpt_path=last", "--env.id=lit_rl/Counter-v0", "--env.kwargs={}")
    assert done.code == 0, done.err


def test_losses_that_are_not_finite_spare_the_checkpoint(fit, tmp_path):
    options = [
        "--model.lr=1e30",
        "--model.num_epochs=1",
        "--model.num_minibatches=1",
        "--model.total_frames=320",
    ]
    done = fit(*options, "--trainer.limit_val_batches=0")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert "value_loss is not finite at 64 frames" in line
    assert "lower the learning rate" in line
    assert torch.load(last_checkpoint(tmp_path))["frames"] == 32
    assert finite(last_checkpoint(tmp_path))


def test_logs_that_cannot_be_written(refused_fit, tmp_path):
    (tmp_path / "logs").write_text("a file")
    assert "cannot write to logs/ppo_cartpole: " in refused_fit()
    (tmp_path / "logs").unlink()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "x").write_text("a file")
    assert "logs/x is a file, not a folder" in refused_fit("--name=x")


def test_checkpoints_without_a_folder_of_their_own(refused_fit):
    assert "trainer.logger false leaves checkpoints without a folder" in refused_fit("--trainer.logger=false")


def test_a_write_protected_folder(refused_fit, tmp_path, monkeypatch):
    # Not by chmod: permissions do not bind every user.
    real = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    assert "is write-protected" in refused_fit()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        ),
    ],
    ids=["device", "CPU"],
)
def test_no_memory_for_torch(error, fit, monkeypatch):
    def step(*_):
        raise error

    monkeypatch.setattr("lit_rl.algorithms.LitPPO.training_step", step)
    done = fit()
    assert done.code == 2
    assert done.err == "lit-rl: error: out of memory: make batches, windows or the network smaller\n"


@pytest.mark.parametrize("saves", [True, False])
def test_a_stopped_run_goes_on_where_it_was_saved(saves, fit, monkeypatch):
    def step(*_):
        raise SIGTERMException

    monkeypatch.setattr("lit_rl.algorithms.LitPPO.training_step", step)
    done = fit(f"--trainer.enable_checkpointing={saves}")
    assert done.code == 128 + signal.SIGTERM
    assert done.out.splitlines()[-1] == "stopped by SIGTERM" + ("; --ckpt_path last goes on" if saves else "")


def test_what_lightning_refuses_while_it_runs(fit):
    done = fit("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/retrun")
    assert done.code == 2
    [line] = done.err.splitlines()
    assert "Early stopping conditioned on metric `val/retrun` which is not available" in line
