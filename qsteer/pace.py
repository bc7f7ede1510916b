# SPDX-License-Identifier: BSD-2-Clause
"""When to look next: soon after a hint, now and then without one, and never more than it may cost.  Pure.

All times are in seconds of one clock that does not jump, and are given by the caller.
"""

_DELAY_S = 0.002
"""From a hint to a look: one change sends several."""
_DELAYS_S = (0.010, 0.050, 0.250)
"""From each look to the next one, where what was announced may come later: a program is loaded, then attached."""
_CPU_SHARE, _CPU_BURST_S = 0.005, 0.03
"""What looks and hints may take of one core for long, and in a burst."""
_CPU_RESUME_S = 0.001
"""Enough for a look or two: to wake up for less would eat up what comes back."""
_REPORTS_PER_S, _REPORTS_BURST = 5.0, 30
"""Changes reported for long, and in a burst: what the caller does then costs far more than a look."""


class Bucket:
    """An amount that comes back with time, up to a limit; what is taken may be more than there is."""

    def __init__(self, *, per_s: float, limit: float, now: float) -> None:
        self._per_s = per_s
        self._limit = limit
        self._level = limit
        self._at = now

    def take(self, amount: float, now: float) -> None:
        self._level = self._level_at(now) - amount
        self._at = now

    def has(self, amount: float, now: float) -> bool:
        """Whether there is that much, but for what adding up times leaves."""
        return self._level_at(now) > amount - 1e-9

    def ready_at(self, amount: float, now: float) -> float:
        """When there is that much, ``now`` at the earliest."""
        return now + max(0.0, amount - self._level_at(now)) / self._per_s

    def _level_at(self, now: float) -> float:
        return min(self._limit, self._level + (now - self._at) * self._per_s)


class Pace:
    """A look at least every ``interval_s``, the first one at once."""

    def __init__(self, *, interval_s: float, now: float) -> None:
        self._interval_s = interval_s
        self._cpu = Bucket(per_s=_CPU_SHARE, limit=_CPU_BURST_S, now=now)
        self._reports = Bucket(per_s=_REPORTS_PER_S, limit=_REPORTS_BURST, now=now)
        self._broke = False
        self._delays: tuple[float, ...] = ()
        self._wanted = now
        self._latest = now

    def hinted(self, now: float, *, early: bool) -> None:
        """Something may have changed, or (``early``) be about to."""
        self._wanted = min(self._wanted, now + _DELAY_S)
        if early:
            self._delays = _DELAYS_S

    def looked(self, now: float, *, changed: bool) -> None:
        """A look is done."""
        if changed:
            self._reports.take(1, now)
        delay = self._delays[0] if self._delays else self._interval_s
        self._delays = self._delays[1:]
        self._wanted = now + min(delay, self._interval_s)
        self._latest = now + self._interval_s

    def charge(self, cpu_s: float, now: float) -> None:
        """So much time of a core was spent on looks and hints."""
        self._broke = self._broke and not self._cpu.has(_CPU_RESUME_S, now)
        self._cpu.take(cpu_s, now)
        self._broke = self._broke or not self._cpu.has(0.0, now)

    def affordable_at(self, now: float) -> float:
        """Until when neither hints nor what was wanted earlier may cause a look."""
        cpu_at = self._cpu.ready_at(_CPU_RESUME_S, now) if self._broke else now
        return min(self._latest, max(cpu_at, self._reports.ready_at(1, now)))

    def listens(self, now: float) -> bool:
        """Whether a hint would make a difference: it is affordable, and no look comes as soon anyway."""
        return self.affordable_at(now) <= now and self._wanted > now + _DELAY_S

    def look_at(self, now: float) -> float:
        """When to look next, as far as is known now."""
        return max(self._wanted, self.affordable_at(now))
