"""Trunks by name, in options and in YAML, and configurations that come back as they were printed."""

import json

import pytest
import yaml
from cli_helpers import CARTPOLE, ROOT, TINY
from lightning.pytorch.callbacks import EarlyStopping

from lit_rl import checkpoints, cli, registry
from lit_rl.trunks import GRU, LSTM, MLP


def configurations():
    """Every YAML of `configs/`; those of trunks that are not installed are skipped."""
    installed = {entry.name for entry in registry.entries()}
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        trunk = yaml.safe_load(path.read_text())["model"]["init_args"].get("trunk", "mlp")
        name = trunk if isinstance(trunk, str) else trunk["class_path"]
        missing = pytest.mark.skipif(name not in installed, reason=f"trunk {name} is not installed")
        yield pytest.param(path, id=path.stem, marks=missing)


CONFIGS = list(configurations())


def built(*options):
    return cli.build(
        ["fit", "--config", str(CARTPOLE), *TINY, "--model.num_minibatches=1", *map(str, options)]
    )


def printed(lit_rl, *arguments):
    done = lit_rl("fit", *arguments, "--print_config")
    assert done.code == 0, done.err
    return done.out


@pytest.mark.parametrize(
    "options",
    [
        ["--model.trunk", "gru", "--model.trunk.d_model", "128"],
        ["--model.trunk=gru", "--model.trunk.d_model=128"],
        ["--model.trunk=lit-rl/gru", "--model.trunk.d_model=128"],
        ["--model.trunk=lit_rl.trunks.GRU", "--model.trunk.d_model=128"],
        ["--model.trunk.class_path=gru", "--model.trunk.init_args.d_model=128"],
        ["--model.init_args.trunk=gru", "--model.init_args.trunk.init_args.d_model=128"],
        ['--model.trunk={"class_path": "gru", "init_args": {"d_model": 128}}'],
    ],
)
def test_a_trunk_by_name_and_its_options(options, lit_rl):
    trunk = built(*options).model.agent.trunk
    assert type(trunk) is GRU
    assert trunk.out_features == 128
    assert trunk.rnn.num_layers == 1


def test_a_trunk_of_another_package(lit_rl):
    plugin = pytest.importorskip("lit_rl_mingru")
    trunk = built("--model.trunk=lit-rl-mingru/mingru").model.agent.trunk
    assert type(trunk) is plugin.MinGRU


def write(folder, trunk):
    config = yaml.safe_load(CARTPOLE.read_text())
    config["model"]["init_args"]["trunk"] = trunk
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.mark.parametrize("trunk", ["gru", {"class_path": "gru"}, {"class_path": "lit-rl/gru"}])
def test_a_trunk_by_name_in_yaml(tmp_path, lit_rl, trunk):
    tree = yaml.safe_load(printed(lit_rl, f"--config={write(tmp_path, trunk)}"))
    assert tree["model"]["init_args"]["trunk"] == {
        "class_path": "lit_rl.trunks.GRU",
        "init_args": {"d_model": 128, "n_layers": 1},
    }


def test_options_of_a_trunk_in_yaml(tmp_path, lit_rl):
    path = write(tmp_path, {"class_path": "gru", "init_args": {"d_model": 32}})
    trunk = built("--config", path).model.agent.trunk
    assert (type(trunk), trunk.out_features) == (GRU, 32)


def test_another_trunk_keeps_no_options_of_the_one_it_replaces(tmp_path, lit_rl):
    path = write(tmp_path, {"class_path": "mlp", "init_args": {"d_model": 16, "n_layers": 3}})
    agent = built("--config", path).model.agent
    assert (type(agent.trunk), agent.trunk.out_features) == (MLP, 16)
    agent = built("--config", path, "--model.trunk=lstm").model.agent
    assert (type(agent.trunk), agent.trunk.out_features, agent.trunk.rnn.num_layers) == (LSTM, 128, 1)
    # The same trunk named anew starts from its own defaults, too.
    assert built("--config", path, "--model.trunk=mlp").model.agent.trunk.out_features == 64


def test_one_option_of_the_trunk_in_yaml(tmp_path, lit_rl):
    path = write(tmp_path, {"class_path": "mlp", "init_args": {"d_model": 16, "n_layers": 3}})
    trunk = built("--config", path, "--model.trunk.d_model=24").model.agent.trunk
    assert (type(trunk), trunk.out_features, len(trunk.layers)) == (MLP, 24, 3)


@pytest.mark.parametrize("path", CONFIGS)
def test_printed_configurations_come_back(path, tmp_path, lit_rl):
    first = printed(lit_rl, "--config", path)
    (tmp_path / "printed.yaml").write_text(first)
    second = printed(lit_rl, "--config", "printed.yaml")
    assert second == first
    assert yaml.safe_load(first)["env"]["id"] == yaml.safe_load(path.read_text())["env"]["id"]


def test_a_printed_configuration_with_another_trunk_trains_the_same(tmp_path, lit_rl, fit):
    options = ["--model.trunk", "gru", "--model.trunk.d_model", "8", "--model.num_minibatches=1"]
    (tmp_path / "gru.yaml").write_text(printed(lit_rl, "--config", CARTPOLE, *TINY, *options))
    direct, again = fit(*options), lit_rl("fit", "--config", "gru.yaml")
    assert direct.code == again.code == 0, again.err
    versions = [tmp_path / f"logs/ppo_cartpole/version_{i}" for i in (0, 1)]
    assert (versions[0] / "config.yaml").read_text() == (versions[1] / "config.yaml").read_text()
    evaluation = [line for line in direct.out.splitlines() if line.startswith("evaluation:")]
    assert evaluation
    assert evaluation == [line for line in again.out.splitlines() if line.startswith("evaluation:")]


@pytest.mark.parametrize("form", [["--model.trunk.help", "gru"], ["--model.trunk.help=lit-rl/gru"]])
def test_help_of_a_trunk(lit_rl, form):
    done = lit_rl("fit", *form)
    assert done.code == 0
    assert "lit_rl.trunks.GRU" in done.out
    assert "d_model D_MODEL" in done.out
    assert "(type: int, default: 128)" in done.out


class Hinted(MLP):
    """Its annotation is known to type checkers alone."""

    widths: "Nowhere"  # noqa: F821


def test_annotations_may_be_for_type_checkers_alone(fit):
    done = fit(f"--model.trunk={__name__}.Hinted")
    assert done.code == 0, done.err


@pytest.mark.parametrize("path", CONFIGS)
def test_every_configuration_trains(path, lit_rl, tmp_path):
    config = yaml.safe_load(path.read_text())
    data, model = config["data"], config["model"]["init_args"]
    little = ["--env.time_limit=30", "--episodes=1"]
    if data["class_path"] == "RolloutDataModule":
        length = max(64, 2 * (data["init_args"].get("sequence_length") or 1))
        little += [f"--data.rollout_length={length}", "--model.num_epochs=1"]
        little += ["--data.frames_per_epoch=1", "--model.total_frames=1"]
    else:
        steps = model.get("window", 1) + model.get("n_step", 1) + data["init_args"]["steps_per_block"]
        frames = max(120, steps * config["env"]["num_envs"])  # the first window is whole by then
        little += ["--model.learning_starts=60", "--model.updates_per_block=1"]
        little += ["--data.frames_per_epoch=60", f"--model.total_frames={frames}"]
    done = lit_rl("fit", f"--config={path}", *little)
    assert done.code == 0, done.err
    assert "evaluation: return " in done.out
    (last,) = tmp_path.glob("logs/*/version_0/checkpoints/last.ckpt")
    assert checkpoints.load(last)["global_step"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "LitDQN"], {"max_grad_norm": 10.0, "anneal_lr": False}),
        (["--model=lit_rl.algorithms.LitDQN", "--model.lr=0.5"], {"max_grad_norm": 10.0, "lr": 0.5}),
        (["--config", str(CARTPOLE), "--model", "LitDQN"], {"max_grad_norm": 10.0, "total_frames": 150_000}),
        (["--config", "{model: {class_path: LitDQN, init_args: {gamma: 0.5}}}"], {"lr": 1e-3, "gamma": 0.5}),
        (["-c", "{model: {class_path: LitDQN}}"], {"max_grad_norm": 10.0, "lr": 1e-3}),
        (["-c={model: {class_path: LitDQN}}"], {"max_grad_norm": 10.0, "lr": 1e-3}),
        (["--model", "{class_path: LitDQN, init_args: {gamma: 0.5}}"], {"max_grad_norm": 10.0, "gamma": 0.5}),
        (["--model", "LitDQN", "--model", "LitPPO"], {"max_grad_norm": 0.5, "anneal_lr": True}),
        ([], {"max_grad_norm": 0.5, "anneal_lr": True}),
    ],
)
def test_what_is_not_said_is_the_default_of_the_chosen_algorithm(options, expected, lit_rl):
    model = yaml.safe_load(printed(lit_rl, *options))["model"]["init_args"]
    assert {key: model[key] for key in expected} == expected


def test_one_callback_needs_no_list():
    callback = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/return"}}
    command = built("--config", json.dumps({"trainer": {"callbacks": callback}}))
    assert sum(isinstance(one, EarlyStopping) for one in command.trainer.callbacks) == 1
