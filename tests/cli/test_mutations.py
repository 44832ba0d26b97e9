"""Property: whatever stands in a configuration, the command ends with code 0 or 2, and 2 means one line."""

import contextlib
import copy
import tempfile
from pathlib import Path

import pytest
import yaml
from cli_helpers import run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

VALID = {
    "seed_everything": 1,
    "name": "mutant",
    "episodes": 1,
    "greedy": True,
    "torch_threads": 1,
    "trainer": {
        "accelerator": "cpu",
        "precision": "32-true",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "check_val_every_n_epoch": 1,
        "val_check_interval": 1.0,
        "gradient_clip_val": None,
        "accumulate_grad_batches": 1,
        "max_time": None,
        "callbacks": None,
        "profiler": None,
        "default_root_dir": None,
    },
    "env": {
        "id": "lit_rl/Recall-v0",
        "num_envs": 2,
        "backend": "gymnasium",
        "vectorization": "sync",
        "kwargs": {"delay": 1, "cues": 2},
        "time_limit": 5,
        "frame_stack": 2,
        "mask_velocity": False,
        "observation_noise": 0.1,
        "reward_delay": 2,
        "view_size": None,
        "actions": [0, 1],
        "wrappers": ["gymnasium.wrappers.FlattenObservation"],
    },
    "model": {
        "class_path": "LitPPO",
        "init_args": {
            "trunk": {"class_path": "mlp", "init_args": {"d_model": 4, "n_layers": 1, "activation": "relu"}},
            "total_frames": 16,
            "num_epochs": 1,
            "num_minibatches": 2,
            "gamma": 0.9,
            "gae_lambda": 0.95,
            "clip": 0.2,
            "clip_final": 0.1,
            "value_clip": 0.2,
            "value_coef": 0.5,
            "entropy_coef": 0.01,
            "entropy_coef_final": 0.0,
            "normalize_advantage": True,
            "max_grad_norm": 0.5,
            "target_kl": 0.1,
            "lr": 0.001,
            "trunk_lr": 0.001,
            "anneal_lr": True,
            "value_trunk": "separate",
            "encoder_width": 4,
            "normalize_observation": True,
            "normalize_reward": True,
            "squash": False,
            "log_std": 0.0,
        },
    },
    "data": {
        "class_path": "RolloutDataModule",
        "init_args": {
            "rollout_length": 8,
            "sequence_length": 4,
            "frames_per_epoch": 16,
            "evaluation_seed": 7,
        },
    },
}
# However many frames and epochs a mutant asks for.
SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1")
# Large numbers are allowed there, and take as long as they say.
COSTLY = {"num_epochs", "n_layers", "d_model", "encoder_width", "num_envs", "delay", "cues", "rollout_length"}

NUMBERS = st.sampled_from(
    [
        -1,
        0,
        1,
        3,
        2**31,
        2**63,
        10**30,
        -(10**30),
        0.5,
        -2.5,
        1e308,
        float("nan"),
        float("inf"),
        -float("inf"),
    ]
)
WORDS = """
null true 1 1e3 nan a.b.C .. / { *a %s{0} gru no/such
lit_rl.trunks.MLP torch.nn.Linear os.system LitPPO CartPole-v1
"""
TEXTS = st.sampled_from([*WORDS.split(), "", " ", "\0", "\n", "é\u202e", "x" * 300])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = st.sampled_from(
    ["", "class_path", "init_args", "env", "trunk", "nope", "__init__", "a.b", "help", 1, None]
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2), max_leaves=3
)


def places(tree, path=()):
    """The path of every value in nested dictionaries."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def with_value(place, value):
    """The valid configuration with one other value, as text."""
    tree = copy.deepcopy(VALID)
    *path, key = place.split(".")
    section = tree
    for step in path:
        section = section[step]
    section[key] = value
    return yaml.safe_dump(tree).encode()


def is_costly(value):
    return isinstance(value, int | float) and value > 1000


@st.composite
def mutants(draw):
    """The valid configuration after one to three mutations, as text."""
    tree = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(list(places(tree))))
        place = tree
        for step in path:
            place = place[step]
        match draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "add"])):
            case "replace":
                costly = COSTLY & {key}
                place[key] = draw(VALUES.filter(lambda v: not is_costly(v)) if costly else VALUES)
            case "drop":
                del place[key]
            case "rename":
                place[draw(KEYS | st.just(f"{key}s"))] = place.pop(key)
            case "add":
                place[draw(KEYS)] = draw(VALUES)
    text = yaml.safe_dump(tree, allow_unicode=True).encode()
    if draw(st.integers(0, 9)) == 0:  # and the text itself
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(min_size=1, max_size=3)) + text[at:]
    return text


def outcome(text):
    """What becomes of a `fit` with this configuration; where it is refused, nothing may be written."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("mutant.yaml").write_bytes(text)
        done = run("fit", "--config=mutant.yaml", *SHORT)
        written = sorted(path.name for path in Path().iterdir() if path.name != "mutant.yaml")
    return done, written


def test_the_configuration_is_valid_as_it_stands():
    done, written = outcome(yaml.safe_dump(VALID).encode())
    assert done.code == 0, done.err
    assert "evaluation: return " in done.out
    assert written == []


def check(text):
    done, written = outcome(text)
    assert done.code in (0, 2), done
    if done.code == 2:
        [line] = done.err.splitlines()
        assert line.startswith("lit-rl: error: ")
        assert "not finite" in line or written == []
    return done


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("episodes", 2**63, "episodes is 9223372036854775808: it must be at least 1 and at most 2147483647"),
        ("data.init_args.frames_per_epoch", 10**30, "it must be at least 1 and at most 2147483647"),
        ("env.reward_delay", 2**63, "it must be at least 0 and at most 2147483647"),
        ("env.observation_noise", 1e308, "observation of environment 0 of lit_rl/Recall-v0 is not finite"),
        ("model.init_args.clip", 1e308, "clip is 1e+308: it must be above 0 and at most 1000000.0"),
        ("model.init_args.lr", 1e308, "not finite"),
        ("model.init_args.trunk.init_args", 3, "trunk.init_args takes options with their values, not 3"),
        ("model.init_args", 3, "model takes LitAgent"),
        ("trainer.check_val_every_n_epoch", 0, "see the options of trainer"),
        ("trainer.val_check_interval", 3, "see the options of trainer"),
        ("trainer.gradient_clip_val", 1, "set model.max_grad_norm"),
        ("name", "\0", "cannot be that of a folder"),
        ("name", "x" * 300, "cannot be that of a folder"),
        ("torch_threads", "", "torch_threads takes int, not ''"),
    ],
)
def test_extreme_values(place, value, message):
    done = check(with_value(place, value))
    assert done.code == 2
    assert message in done.err


@pytest.mark.filterwarnings("ignore")
@settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
@given(mutants())
@example(b"")
@example(b"\xff")
def test_mutants_are_trained_or_refused_in_one_line(text):
    check(text)
