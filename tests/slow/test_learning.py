"""What must be learnt, three seeds each, and what must not be: an MLP where memory is needed.

Every run is an experiment of `configs/` as the command line runs it; the last evaluation counts
(20 greedy episodes with the weights that training ended with).
"""

from pathlib import Path

import pytest

from lit_rl.cli import build

CONFIGS = Path(__file__).parents[2] / "configs"
SEEDS = (1, 2, 3)

pytestmark = pytest.mark.slow


def final_metrics(config: str, seed: int, *options: str) -> dict[str, float]:
    """Trains one configuration and returns the metrics of its last evaluation."""
    quiet = ("--trainer.enable_progress_bar", "false")
    argv = ["fit", "--config", str(CONFIGS / config), "--seed_everything", str(seed), *quiet, *options]
    cli = build(argv)
    cli.run()
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    print(f"\n{config} seed {seed} {' '.join(options)}: {cli.model.frames} frames, {metrics}")
    return metrics


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("seed", SEEDS)
def test_cartpole_by_150k_frames(seed: int) -> None:
    assert final_metrics("ppo_cartpole.yaml", seed)["val/return"] >= 475


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_cartpole_by_150k_frames_with_memory(seed: int) -> None:
    assert final_metrics("ppo_cartpole_masked_lstm.yaml", seed)["val/return"] >= 450


@pytest.mark.parametrize("seed", SEEDS)
def test_masked_cartpole_is_beyond_an_mlp(seed: int) -> None:
    metrics = final_metrics("ppo_cartpole_masked_lstm.yaml", seed, "--model.trunk", "mlp")
    assert metrics["val/return"] < 200


@pytest.mark.parametrize("seed", SEEDS)
def test_pendulum_by_200k_frames(seed: int) -> None:
    assert final_metrics("ppo_pendulum.yaml", seed)["val/return"] >= -250


@pytest.mark.parametrize("seed", SEEDS)
def test_recall_by_100k_frames_with_memory(seed: int) -> None:
    assert final_metrics("ppo_recall_gru.yaml", seed, "--episodes", "100")["val/success"] >= 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_recall_leaves_an_mlp_at_chance(seed: int) -> None:
    metrics = final_metrics("ppo_recall_gru.yaml", seed, "--episodes", "100", "--model.trunk", "mlp")
    # One of four cues: 0.25, and 0.40 is 3.5 standard deviations of 100 episodes away.
    assert metrics["val/success"] < 0.40


@pytest.mark.parametrize("seed", SEEDS)
def test_doorkey_by_300k_frames(seed: int) -> None:
    assert final_metrics("ppo_doorkey_gru.yaml", seed)["val/success"] >= 0.9


# ------------------------------------------------------------------ DQN


@pytest.mark.parametrize("seed", SEEDS)
def test_dqn_cartpole_by_100k_frames(seed: int) -> None:
    assert final_metrics("dqn_cartpole_mlp.yaml", seed)["val/return"] >= 475


@pytest.mark.parametrize("trunk", ["lstm", "mamba2"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dqn_masked_cartpole_by_120k_frames_with_memory(seed: int, trunk: str) -> None:
    assert final_metrics(f"dqn_cartpole_masked_{trunk}.yaml", seed)["val/return"] >= 400


@pytest.mark.parametrize("seed", SEEDS)
def test_dqn_masked_cartpole_is_beyond_an_mlp(seed: int) -> None:
    metrics = final_metrics("dqn_cartpole_masked_lstm.yaml", seed, "--model.trunk", "mlp")
    assert metrics["val/return"] < 200


@pytest.mark.parametrize("seed", SEEDS)
def test_dqn_recall_with_memory(seed: int) -> None:
    assert final_metrics("dqn_recall_lstm.yaml", seed, "--episodes", "100")["val/success"] >= 0.95


@pytest.mark.parametrize("seed", SEEDS)
def test_dqn_recall_leaves_an_mlp_at_chance(seed: int) -> None:
    metrics = final_metrics("dqn_recall_lstm.yaml", seed, "--episodes", "100", "--model.trunk", "mlp")
    assert metrics["val/success"] < 0.40
