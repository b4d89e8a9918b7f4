"""The pauses between starts of a child."""

from __future__ import annotations

from deploy.child import Backoff


def test_pauses_double_to_the_longest_and_begin_anew_after_health() -> None:
    """1, 2, 4, 8, 16, 30, 30 seconds at most, half of that at least."""
    most, least = Backoff(chance=lambda: 0.0), Backoff(chance=lambda: 1.0)
    assert [most.next() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [least.next() for _ in range(7)] == [0.5, 1, 2, 4, 8, 15, 15]
    most.reset()
    assert most.next() == 1
    assert all(0.5 <= Backoff().next() <= 1 for _ in range(100))
    assert len({Backoff().next() for _ in range(100)}) > 90, "without chance all sites would call in step"
