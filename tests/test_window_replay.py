"""The replay of windows: what is drawn how often, with which weight, and what comes back from disk.

Shapes: W windows stored, M drawn, L steps a window.
"""

import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data.replay_buffers.samplers import PrioritizedSampler

from lit_rl import keys
from lit_rl.data.window_replay import WindowReplay
from lit_rl.errors import UserError

L = 3
ALPHA, BETA = 0.6, 0.4
PRIORITIES = torch.tensor([0.1, 3.0, 1.0, 0.5, 2.0, 1.5, 0.01, 1.0])


def windows(*marks: int) -> TensorDict:
    """Windows ``[W]`` that have their mark in every entry, of every type that there is."""
    mark = torch.tensor(marks, dtype=torch.long)
    W = len(marks)
    by_step = mark[:, None].expand(W, L)
    observation = TensorDict(
        {
            "picture": by_step[..., None, None].expand(W, L, 2, 2).to(torch.uint8),
            "a/b": by_step.double(),  # an entry may be called anything
        },
        [W, L],
    )
    steps = {
        keys.OBSERVATION: observation,
        keys.ACTION: by_step.clone(),
        keys.REWARD: by_step.float(),
        keys.TERMINATED: by_step % 2 == 0,
        keys.LATENT: by_step[..., None].expand(W, L, 4).float(),
    }
    memory = {"h": mark[:, None, None].expand(W, 1, 5).to(torch.bfloat16), "nothing": torch.empty(W, 1, 3, 0)}
    state = TensorDict(memory, [W])
    return TensorDict({keys.STEPS: TensorDict(steps, [W, L]), keys.TRUNK_STATE: state}, [W])


def marks(drawn: TensorDict) -> list[int]:
    """The marks of windows, each of which must be whole."""
    found = drawn[keys.STEPS, keys.ACTION][:, 0].tolist()
    again = windows(*found)
    assert set(again.keys(True, True)) == set(drawn.keys(True, True))
    assert (again == drawn).all()
    return found


def replay_of(
    capacity: int = 8,
    stored: int = 8,
    storage: str = "memory",
    alpha: float = ALPHA,
    seed: int = 0,
    loss_steps: int = L,
) -> WindowReplay:
    options: dict[str, Any] = {"storage": storage, "made_with": {"loss_steps": loss_steps}}
    replay = WindowReplay(capacity, alpha=alpha, seed=seed, **options)
    if stored:
        replay.extend(windows(*range(stored)))
    return replay


def prioritized(priorities: Tensor = PRIORITIES, **options: Any) -> WindowReplay:
    replay = replay_of(len(priorities), len(priorities), **options)
    replay.update_priority(torch.arange(len(priorities)), priorities)
    return replay


# ------------------------------------------------------------------ drawing


def chi_square(replay: WindowReplay, probability: Tensor, draws: int = 40_000) -> float:
    drawn = torch.cat([replay.sample(1000).indices for _ in range(draws // 1000)])
    found, expected = torch.bincount(drawn, minlength=len(probability)), draws * probability
    return float(((found - expected) ** 2 / expected).sum())


# The chi-square distribution of 7 degrees of freedom: above 24.3 with a probability of 0.001.
LIMIT = 24.3


@pytest.mark.parametrize("alpha", [0.6, 1.0, 0.0])
def test_frequencies_are_powers_of_priorities(alpha: float) -> None:
    weight = PRIORITIES.double() ** alpha
    replay = prioritized(alpha=alpha)
    assert chi_square(replay, weight / weight.sum()) < LIMIT
    # Negative control: another exponent is told apart.
    other = PRIORITIES.double() ** (alpha + 0.1)
    assert chi_square(replay, other / other.sum()) > LIMIT


def weights_by_hand(priorities: Tensor, at: Tensor, beta: float = 1.0) -> Tensor:
    probability = priorities.double() ** ALPHA
    weight = (len(probability) * probability / probability.sum())[at] ** -beta
    return (weight / weight.max()).float()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_by_hand(beta: float) -> None:
    """(N P(i)) ** -beta divided by the largest of those drawn, P proportional to the priority ** alpha."""
    drawn = prioritized().sample(64, beta=beta)
    torch.testing.assert_close(
        drawn.weight, weights_by_hand(PRIORITIES, drawn.indices, beta), rtol=1e-5, atol=0
    )
    assert marks(drawn.windows) == drawn.indices.tolist()
    assert len(set(drawn.indices.tolist())) > 3


def test_a_window_that_is_not_drawn_does_not_scale_the_others() -> None:
    priorities = torch.tensor([1e-6, *[1.0] * 7])
    drawn = prioritized(priorities).sample(64)
    assert 0 not in drawn.indices
    assert drawn.weight.tolist() == [1.0] * 64


def test_weights_are_ones_where_drawn_uniformly() -> None:
    drawn = replay_of(alpha=0.0).sample(5, beta=BETA)
    assert drawn.weight.tolist() == [1.0] * 5
    assert marks(drawn.windows) == drawn.indices.tolist()


def test_new_windows_have_the_highest_priority_so_far() -> None:
    """Even when the window that had it is no longer there."""
    replay = prioritized(torch.tensor([0.5, 5.0, 1.0, 2.0]))
    replay.extend(windows(4, 5))  # over 0 and 1
    drawn = replay.sample(256, beta=1.0)
    by_hand = weights_by_hand(torch.tensor([5.0, 5.0, 1.0, 2.0]), drawn.indices)
    torch.testing.assert_close(drawn.weight, by_hand, rtol=1e-5, atol=0)
    assert set(drawn.indices.tolist()) == {0, 1, 2, 3}
    replay.update_priority(torch.tensor([0, 1]), torch.tensor([0.1, 0.1]))
    replay.extend(windows(6))
    drawn = replay.sample(256, beta=1.0)
    by_hand = weights_by_hand(torch.tensor([0.1, 0.1, 5.0, 2.0]), drawn.indices)
    torch.testing.assert_close(drawn.weight, by_hand, rtol=1e-5, atol=0)


def test_new_windows_have_a_priority_of_at_least_one() -> None:
    replay = prioritized(torch.tensor([0.5, 0.25, 0.5, 0.25]))
    replay.extend(windows(4))  # over 0
    drawn = replay.sample(256, beta=1.0)
    by_hand = weights_by_hand(torch.tensor([1.0, 0.25, 0.5, 0.25]), drawn.indices)
    torch.testing.assert_close(drawn.weight, by_hand, rtol=1e-5, atol=0)


def test_a_priority_of_a_window_drawn_twice_is_told_once_or_twice() -> None:
    replay = replay_of(4, 4)
    replay.update_priority(torch.tensor([2, 2, 0]), torch.tensor([3.0, 3.0, 0.5]))
    drawn = replay.sample(64, beta=1.0)
    by_hand = weights_by_hand(torch.tensor([0.5, 1.0, 3.0, 1.0]), drawn.indices)
    torch.testing.assert_close(drawn.weight, by_hand, rtol=1e-5, atol=0)


def test_draws_come_from_its_own_random_state() -> None:
    for alpha in (0.0, ALPHA):
        draws = []
        for seed, others in ((1, 1), (1, 2), (2, 1)):
            torch.manual_seed(others)
            np.random.seed(others)
            draws.append(replay_of(alpha=alpha, seed=seed).sample(50).indices.tolist())
        assert draws[0] == draws[1]
        assert draws[0] != draws[2]


def test_what_is_drawn_is_the_learners_own() -> None:
    replay = replay_of()
    replay.sample(8).windows.zero_()
    assert set(marks(replay.sample(200).windows)) == set(range(8))


# ------------------------------------------------------------------ the ring


@pytest.mark.parametrize("storage", ["memory", "disk"])
@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_the_oldest_windows_are_overwritten_by_whole_ones(storage: str, alpha: float) -> None:
    capacity, kept = 7, []
    replay = replay_of(capacity, 0, storage, alpha)
    given = 0
    for count in (0, 3, 1, 5, 0, 2, 6, 20, 1):
        replay.extend(windows(*range(given, given + count)))
        given += count
        kept = list(range(given))[-capacity:]
        assert len(replay) == len(kept)
        if kept:
            assert set(marks(replay.sample(300).windows)) == set(kept)
    assert given > 4 * capacity


def test_a_disk_without_room_for_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before the first window: a memory map that finds no room would kill the process."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the replay needs 1 MiB at .* lower buffer_size") as error:
        replay_of(10_000, 1, "disk")
    assert "\n" not in str(error.value)
    replay_of(10_000, 1)


def test_rings_of_one_machine_share_its_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 2**20 // 2))
    alone, one_of_two = (WindowReplay(10_000, storage="disk", copies=copies) for copies in (1, 2))
    alone.extend(windows(1))
    with pytest.raises(UserError, match=r"the replay needs 3 MiB at .* lower buffer_size"):
        one_of_two.extend(windows(1))


def test_a_disk_without_room_for_what_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled().save(tmp_path / "r")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"the replay needs 0 MiB at .* lower buffer_size"):
        loaded(tmp_path / "r", "disk")
    loaded(tmp_path / "r")


def test_a_ring_beyond_memory() -> None:
    with pytest.raises(UserError, match=r"needs \d+ MiB of memory.* set --data.storage disk") as error:
        replay_of(2**45, 1, alpha=0.0)
    assert "\n" not in str(error.value)


def test_priorities_beyond_memory() -> None:
    """Two trees of 2^45 leaves, and as many numbers above them, of 4 bytes."""
    with pytest.raises(UserError, match=rf"the priorities .* need {2**49 // 2**20} MiB .* lower buffer_size"):
        WindowReplay(2**45 - 1, alpha=0.5, storage="disk")


# ------------------------------------------------------------------ on disk

NONE = windows()
STORES = [("memory", 0.0), ("memory", ALPHA), ("disk", ALPHA)]


def filled(storage: str = "memory", alpha: float = ALPHA, stored: int = 13) -> WindowReplay:
    """A ring of 8, after some draws; full, with its oldest window in the middle, unless less is stored."""
    replay = replay_of(8, stored, storage, alpha, seed=5)
    replay.update_priority(torch.arange(2), torch.tensor([9.0, 0.3]))
    replay.update_priority(torch.tensor([0]), torch.tensor([0.7]))
    replay.sample(3)
    return replay


def loaded(
    folder: Path, storage: str = "memory", alpha: float = ALPHA, capacity: int = 8, **options: int
) -> WindowReplay:
    replay = replay_of(capacity, 0, storage, alpha, seed=99, **options)
    replay.load(folder, NONE)
    return replay


def future(replay: WindowReplay) -> list[Any]:
    """Draws, weights and marks from here on, with what is stored and learnt in between."""
    told: list[Any] = []
    for turn in range(6):
        drawn = replay.sample(9, beta=BETA)
        told += [drawn.indices.tolist(), drawn.weight.tolist(), marks(drawn.windows)]
        replay.extend(windows(*range(20 + 3 * turn, 23 + 3 * turn)))
        replay.update_priority(drawn.indices[:2], torch.tensor([0.2 * turn + 0.1] * 2))
    return told


@pytest.mark.parametrize(("storage", "alpha"), STORES)
@pytest.mark.parametrize("stored", [3, 8, 13])
def test_everything_comes_back(tmp_path: Path, storage: str, alpha: float, stored: int) -> None:
    """Contents, priorities (the highest so far among them), place in the ring and random state."""
    replay = filled(storage, alpha, stored)
    replay.save(tmp_path / "a" / "rank_0")
    again = loaded(tmp_path / "a" / "rank_0", storage, alpha)
    twin = loaded(tmp_path / "a" / "rank_0", storage, alpha)
    shutil.rmtree(tmp_path / "a")
    assert len(again) == min(stored, 8)
    after = future(replay)  # saving has changed nothing, and it goes on
    assert future(again) == after
    # Negative control: one draw more, and the future is another.
    twin.sample(1)
    assert future(twin) != after


def test_loaded_windows_have_the_form_of_collected_ones(tmp_path: Path) -> None:
    replay = filled()
    replay.save(tmp_path / "r")
    for found in (replay.sample(4).windows, loaded(tmp_path / "r").sample(4).windows):
        assert found[keys.STEPS].batch_size == (4, L)
        assert found[keys.STEPS, keys.OBSERVATION].batch_size == (4, L)
        assert found[keys.TRUNK_STATE].batch_size == (4,)


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
def test_an_empty_replay_comes_back(tmp_path: Path, alpha: float) -> None:
    replay = replay_of(8, 0, alpha=alpha, seed=5)
    replay.save(tmp_path / "r")
    again = loaded(tmp_path / "r", alpha=alpha)
    assert len(again) == 0
    for one in (replay, again):
        one.extend(windows(0, 1, 2))
    assert future(again) == future(replay)


def test_it_takes_the_room_of_what_is_stored(tmp_path: Path) -> None:
    """And not of all that could be."""
    sizes = []
    for number, capacity in enumerate((16, 16_000)):
        folder = tmp_path / str(number)
        replay_of(capacity, 8, alpha=0.0).save(folder)
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*")))
    assert sizes[1] - sizes[0] < 100


def test_another_exponent_applies_to_the_saved_priorities(tmp_path: Path) -> None:
    prioritized().save(tmp_path / "r")
    drawn = loaded(tmp_path / "r", alpha=1.0).sample(64, beta=1.0)
    by_hand = PRIORITIES[drawn.indices].min() / PRIORITIES[drawn.indices]
    torch.testing.assert_close(drawn.weight, by_hand, rtol=1e-4, atol=0)


def test_half_written_folders_are_ignored_and_go(tmp_path: Path) -> None:
    """A process that is killed while it saves leaves `rank_0.partial`."""
    folder, partial = tmp_path / "rank_0", tmp_path / "rank_0.partial"
    filled().save(folder)
    shutil.copytree(folder, partial)
    (partial / "windows.json").unlink()
    assert len(loaded(folder)) == 8
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"no whole replay at .*rank_0"):
        loaded(folder)
    filled(stored=3).save(folder)
    assert len(loaded(folder)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0"]


def fails(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))


def no_room_for_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = np.save, []

    def third(path: Path, array: np.ndarray) -> None:
        count.append(path)
        if len(count) == 3:
            fails()
        real(path, array)

    monkeypatch.setattr(np, "save", third)


def no_room_for_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrioritizedSampler, "dumps", fails)


def no_room_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_text", fails)


def no_room_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fails)


@pytest.mark.parametrize(
    "fault",
    [no_room, no_room_for_an_array, no_room_for_priorities, no_room_for_the_end, no_room_after_all],
)
def test_a_full_disk_costs_nothing_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    replay = filled()
    for name in ("frames_1", "frames_2"):
        replay.save(tmp_path / name / "rank_0")
    expected = future(replay)
    for name in ("frames_2", "frames_3"):  # over a former one, and beside it
        with monkeypatch.context() as patch:
            fault(patch)
            with pytest.raises(UserError, match=r"cannot write the replay to .*make room") as error:
                filled(stored=3).save(tmp_path / name / "rank_0")
        assert "\n" not in str(error.value)
        assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "frames_3" / "rank_0").exists()
    for name in ("frames_1", "frames_2"):
        assert future(loaded(tmp_path / name / "rank_0")) == expected
    replay.save(tmp_path / "frames_3" / "rank_0")
    assert len(loaded(tmp_path / "frames_3" / "rank_0")) == 8


# ------------------------------------------------------------------ what does not fit, what is damaged


def test_every_file_cut_off_or_missing_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "rank_0"
    filled().save(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:-1], b"", None):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(UserError, match=r"replay at .*--data.load_replay false") as error:
                loaded(folder)
            assert "\n" not in str(error.value)
            assert content is None or path.read_bytes() == content  # or it would pass for whole later
            path.write_bytes(whole)
    assert len(loaded(folder)) == 8


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"files": 3}', '{"files": {"x": 1}, "windows": "x"}'])
def test_a_table_that_is_none(tmp_path: Path, content: str) -> None:
    filled().save(tmp_path / "r")
    (tmp_path / "r" / "windows.json").write_text(content)
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "r")
    assert "\n" not in str(error.value)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


def test_nothing_that_is_read_is_run(tmp_path: Path) -> None:
    """A replay from elsewhere is data: no file of it is unpickled."""
    folder, sprung = tmp_path / "r", tmp_path / "sprung"
    filled().save(folder)
    table = json.loads((folder / "windows.json").read_text())
    trap = pickle.dumps(Trap(sprung))
    np.save(tmp_path / "trap.npy", np.array([Trap(sprung)]), allow_pickle=True)
    refused = 0
    for name in table["files"]:
        for content in (trap, (tmp_path / "trap.npy").read_bytes()):
            shutil.rmtree(folder)
            filled().save(folder)
            (folder / name).write_bytes(content)
            sizes = table["files"] | {name: len(content)}
            (folder / "windows.json").write_text(json.dumps(table | {"files": sizes}))
            try:
                loaded(folder)
            except UserError:
                refused += 1
    assert refused >= 2 * 10  # numbers are whatever the bytes of the trap say
    assert not sprung.exists()
    # Negative control: it is one.
    pickle.loads(trap)
    assert sprung.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 9}, "capacity is 8 there and 9 in this run"),
        ({"alpha": 0.0}, "prioritized is True there and False in this run"),
        ({"loss_steps": 1}, "loss_steps is 3 there and 1 in this run"),
    ],
)
def test_another_replay_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    filled().save(tmp_path / "r")
    with pytest.raises(UserError, match=message):
        loaded(tmp_path / "r", **options)


def wider(like: TensorDict) -> TensorDict:
    like[keys.STEPS, keys.LATENT] = torch.zeros(0, L, 5)
    return like


def other_type(like: TensorDict) -> TensorDict:
    like[keys.STEPS, keys.REWARD] = torch.zeros(0, L, dtype=torch.float64)
    return like


def without_state(like: TensorDict) -> TensorDict:
    return like.exclude(keys.TRUNK_STATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"steps.latent is \[3, 4\] torch.float32 there and \[3, 5\] torch.float32 in this run"),
        (other_type, r"steps.reward is \[3\] torch.float32 there and \[3\] torch.float64"),
        (without_state, r"trunk_state.h is \[1, 5\] torch.bfloat16 there and absent"),
    ],
)
def test_other_windows_are_refused(
    tmp_path: Path, change: Callable[[TensorDict], TensorDict], message: str
) -> None:
    filled().save(tmp_path / "r")
    with pytest.raises(UserError, match=message):
        replay_of(8, 0).load(tmp_path / "r", change(windows()))


def test_the_table_says_what_is_there(tmp_path: Path) -> None:
    filled().save(tmp_path / "r")
    table = json.loads((tmp_path / "r" / "windows.json").read_text())
    assert (table["windows"], table["capacity"], table["prioritized"]) == (8, 8, True)
    assert Counter(Path(name).suffix for name in table["files"]) == {".npy": 9, ".memmap": 2, ".json": 2}
