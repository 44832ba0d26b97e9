"""What a second signal does. That the first ends a run between two rollouts stands in `tests/runs`."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lit_rl.callbacks import StopOnSignal, stop

NOBODY: Any = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


@pytest.fixture
def handler() -> Iterator[Callable[[int, None], None]]:
    """What training has a signal handled by."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    callback = StopOnSignal()
    callback.on_train_start(NOBODY, NOBODY)
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler)
    assert signal.getsignal(signal.SIGTERM) == handler
    yield handler
    callback.on_train_end(NOBODY, NOBODY)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_stops_at_once(handler, clock, capfd) -> None:
    handler(signal.SIGINT, None)
    clock(0.9)
    handler(signal.SIGINT, None)  # passed on by a launcher
    clock(1.1)
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
    assert capfd.readouterr().err == "\nstopping after this rollout\n"


def test_a_second_sigterm_does_not(handler, clock) -> None:
    handler(signal.SIGTERM, None)
    clock(60.0)
    handler(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
