"""What a training run prints and leaves behind."""

import io
import math
import re

import pytest
import torch
import yaml
from gymnasium.envs.classic_control import CartPoleEnv
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rl.callbacks import RunLogger
from lit_rl.cli import LitRLCLI

TRAINING = {
    "episode/return",
    "episode/length",
    "train/policy_loss",
    "train/value_loss",
    "train/entropy",
    "train/approx_kl",
    "train/clip_fraction",
    "train/explained_variance",
    "train/grad_norm",
    "train/lr",
    "train/trunk_lr",
    "speed/steps_per_second",
    "speed/collect_steps_per_second",
    "speed/learn_steps_per_second",
}


def events(run):
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


@pytest.fixture(scope="module")
def logged(trained):
    return events(trained.checkpoint.parents[1])


def test_the_lines_it_prints(trained):
    run = "logs/tiny/version_0"
    *progress, evaluation, curve, checkpoint, watch = trained.done.out.splitlines()
    assert re.fullmatch(
        r"64 / 64 frames  [\d,]+ steps/s  return [\d.]+ \(.*\)  evaluation [\d.]+", progress[-1]
    )
    assert re.fullmatch(
        r"evaluation: return [\d.]+ \+- [\d.]+, length [\d.]+ \(2 greedy episodes of CartPole-v1\)",
        evaluation,
    )
    assert curve == f"learning curve: {run}/learning_curve.png"
    assert checkpoint == f"checkpoint: {run}/checkpoints/last.ckpt"
    assert watch == "watch: tensorboard --logdir logs"
    assert trained.done.err == ""


def test_the_last_line_is_of_the_evaluation_that_there_was(fit):
    done = fit(
        "--model.total_frames=96", "--trainer.check_val_every_n_epoch=2", "--trainer.limit_val_batches=1"
    )
    assert "(1 greedy episodes of CartPole-v1 after 64 frames)" in done.out


def test_it_takes_denormal_numbers_for_zero(fit, monkeypatch):
    def half_of_the_least() -> float:
        return (torch.tensor(torch.finfo(torch.float32).tiny) / 2).item()

    assert half_of_the_least() > 0
    seen = []
    monkeypatch.setattr(LitRLCLI, "run", lambda self: seen.append(half_of_the_least()))
    assert fit().code == 0
    assert seen == [0.0]


def test_the_files_it_leaves(trained):
    run = trained.checkpoint.parents[1]
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {name for name in names if "tfevents" not in name} == {
        "config.yaml",
        "hparams.yaml",
        "learning_curve.png",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/run.lock",
    }
    with Image.open(run / "learning_curve.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    assert sorted(path.name for path in trained.folder.iterdir()) == ["logs"]


def test_scalars_over_environment_frames(logged):
    for tag in TRAINING - {"episode/return", "episode/length"}:
        points = logged.Scalars(tag)
        assert [point.step for point in points] == [32, 64], tag
        assert all(math.isfinite(point.value) for point in points), tag
    # An episode need not end in every rollout.
    for tag in ("episode/return", "episode/length"):
        assert {point.step for point in logged.Scalars(tag)} <= {32, 64}
    for tag in ("val/return", "val/return_std", "val/length"):
        assert [point.step for point in logged.Scalars(tag)] == [32, 64]


def test_values_that_are_known(logged):
    rates = [point.value for point in logged.Scalars("train/lr")]
    assert rates == pytest.approx([1e-3, 5e-4])
    collecting, learning, both = (
        logged.Scalars(f"speed/{part}steps_per_second")[0].value for part in ("collect_", "learn_", "")
    )
    assert 1 / both == pytest.approx(1 / collecting + 1 / learning, rel=1e-4)
    returns, lengths = ([p.value for p in logged.Scalars(f"episode/{k}")] for k in ("return", "length"))
    assert returns == lengths  # CartPole pays 1 a step


def test_hyperparameters_with_final_metrics_and_configuration_as_text(trained, logged):
    final = {tag: logged.Scalars(tag)[-1] for tag in logged.Tags()["scalars"] if tag.startswith("final/")}
    assert final["final/val/return"].step == 64
    assert final["final/val/return"].value == logged.Scalars("val/return")[-1].value
    text = b"".join(logged.Tensors("config/text_summary")[0].tensor_proto.string_val).decode()
    config = trained.checkpoint.parents[1] / "config.yaml"
    assert text == f"```yaml\n{config.read_text()}\n```"
    tree = yaml.safe_load(config.read_text())
    assert tree["model"]["init_args"]["total_frames"] == 64
    assert yaml.safe_load((config.parent / "hparams.yaml").read_text())["model.total_frames"] == 64


def test_the_evaluation_is_filmed(logged):
    [picture] = logged.Images("evaluation")
    with Image.open(io.BytesIO(picture.encoded_image_string)) as film:
        assert film.format == "GIF"
        assert film.n_frames > 1
    assert picture.step == 64


def test_success_where_the_environment_tells(fit, tmp_path):
    done = fit("--env.id=lit_rl/Recall-v0", "--env.kwargs={delay: 1}")
    assert done.code == 0, done.err
    assert re.search(r"evaluation: return [\d.]+ \+- [\d.]+, success [01]\.\d\d, length 3\.0 ", done.out)
    logged = events(tmp_path / "logs/ppo_cartpole/version_0")
    for tag in ("episode/success", "val/success"):
        assert [point.step for point in logged.Scalars(tag)] == [32, 64]
        assert all(0 <= point.value <= 1 for point in logged.Scalars(tag))
    # An environment that cannot be drawn is no fault of the run.
    assert logged.Tags()["images"] == []


def test_a_renderer_that_draws_nothing_is_no_fault_of_the_run(fit, monkeypatch):
    monkeypatch.setattr(CartPoleEnv, "render", lambda self: None)
    done = fit()
    assert done.code == 0, done.err
    assert "no evaluation video: CartPole-v1 cannot be drawn here (TypeError: " in done.out


def test_runs_of_one_name_that_start_together_get_a_folder_each(tmp_path, monkeypatch):
    # What each sees before any of them has written.
    monkeypatch.setattr(TensorBoardLogger, "_get_next_version", lambda self: 0)
    loggers = [RunLogger(tmp_path, name="same") for _ in range(3)]
    assert [logger.version for logger in loggers] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.glob("same/*")) == ["version_0", "version_1", "version_2"]


def test_a_seed_makes_a_run_reproducible(fit, tmp_path, trained):
    assert fit("--model.normalize_observation=true").code == 0
    assert fit("--model.normalize_observation=true", "--seed_everything=2").code == 0
    same, other = (
        torch.load(tmp_path / f"logs/ppo_cartpole/version_{i}/checkpoints/last.ckpt")["state_dict"]
        for i in (0, 1)
    )
    first = torch.load(trained.checkpoint)["state_dict"]
    assert all(torch.equal(value, same[key]) for key, value in first.items())
    assert not all(torch.equal(value, other[key]) for key, value in first.items())


def test_without_logs_and_checkpoints(fit, tmp_path):
    done = fit("--trainer.logger=false", "--trainer.enable_checkpointing=false")
    assert done.code == 0, done.err
    assert "evaluation: return" in done.out
    assert not list(tmp_path.iterdir())
