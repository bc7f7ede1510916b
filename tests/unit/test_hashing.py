# SPDX-License-Identifier: BSD-2-Clause
"""What is made of a probe's answer; tests/kernel/test_vnet_hash.py has real ones."""

import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qsteer import hashing, kernel, marks
from qsteer._shim import lib
from qsteer.errors import QsteerError
from qsteer.model import Generation, Source, VnetHash
from qsteer.rss import BASE_TYPES, RssConfig, known_types
from tests.unit import taps

PID = 4242


def _words(key: bytes) -> bytes:
    return b"".join(key[at : at + 4][::-1] for at in range(0, len(key), 4))


WORKS = {"steers": 1, "reports": 1, "exclusive": 0, "strict": 0}


class Probes:
    """A shim whose probe answers so, and is counted."""

    def __init__(self, result: int = 0, abi: int = lib.QS_VNET_ABI_12, types: int = 0x3F, **found: int) -> None:
        self.result, self.abi, self.types, self.found = result, abi, types, WORKS | found
        self.calls = self.ended = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def qs_vnet_probe_end(self, probing: Any) -> None:
        assert probing.pid == PID
        self.ended += 1

    def qs_vnet_probe_start(self, probing: Any, out: Any) -> int:
        self.calls += 1
        probing.pid = PID
        out.can.abi, out.can.types = self.abi, self.types
        for name, value in self.found.items():
            setattr(out, name, value)
        return self.result


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_known", {})
    monkeypatch.setattr(kernel, "driver", lambda: 7)


def use(monkeypatch: pytest.MonkeyPatch, probes: Probes, told: Callable[[bytes], bytes] | None = _words) -> Probes:
    """``told`` makes what is in the kernel's memory of a key; None where that does not show."""

    def vnet_hashes(pid: int = 0) -> dict[tuple[int, int], VnetHash]:
        assert pid in (0, PID)
        types = known_types(probes.types)
        key = told(bytes(lib.qs_vnet_probe_key)) if told else b""
        config = RssConfig(types=types, key=key, table=tuple(lib.qs_vnet_probe_table)) if told else None
        return {(1, 2): VnetHash(rss=True, report=False, types=types, config=config)}

    monkeypatch.setattr(hashing, "lib", probes)
    monkeypatch.setattr(kernel, "vnet_hashes", vnet_hashes)
    return probes


@pytest.mark.parametrize(
    ("probes", "generation"),
    [
        (Probes(), Generation.V12),
        (Probes(abi=lib.QS_VNET_ABI_3), Generation.V11),
        (Probes(abi=lib.QS_VNET_ABI_3, exclusive=1), Generation.V9),
        (Probes(abi=lib.QS_VNET_ABI_3, exclusive=1, strict=1), Generation.V4),
        (Probes(exclusive=1), None),
        (Probes(steers=0), None),
    ],
)
def test_generations(monkeypatch: pytest.MonkeyPatch, probes: Probes, generation: Generation | None) -> None:
    use(monkeypatch, probes)
    found = hashing.hashing()
    assert found.generation is generation
    assert (found.types, found.reports, found.why_not) == (BASE_TYPES, True, "") if generation else found.why_not
    assert not found.denied and hashing.hashing() is found and probes.calls == probes.ended == 1


def test_without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Probes(reports=0, types=0x7))
    found = hashing.hashing()
    assert found.generation and not found.reports and int(found.types) == 7


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT])
def test_a_right_that_is_missing(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    use(monkeypatch, Probes(result=-code))
    assert hashing.hashing().denied and "CAP_NET_RAW" in hashing.hashing().why_not


def test_what_may_pass_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = use(monkeypatch, Probes(result=-errno.ETIMEDOUT))
    assert "could not be seen: Connection timed out" in hashing.hashing().why_not
    assert hashing.hashing() and probes.calls == 1
    later = time.monotonic() + 100
    monkeypatch.setattr(time, "monotonic", lambda: later)
    probes.result = 0
    assert hashing.hashing().generation and probes.calls == 2


def test_another_tun(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = use(monkeypatch, Probes())
    assert hashing.hashing().generation
    monkeypatch.setattr(kernel, "driver", lambda: 8)
    probes.result = -errno.EOPNOTSUPP
    assert not hashing.hashing().generation and probes.calls == 2
    monkeypatch.setattr(kernel, "driver", lambda: 0)
    assert not hashing.hashing().generation and probes.calls == 2


@pytest.mark.parametrize("told", [bytes, _words])
def test_how_a_key_is_kept(monkeypatch: pytest.MonkeyPatch, told: Callable[[bytes], bytes]) -> None:
    """As it came, or in words of the machine's order: it is seen, and turned round."""
    use(monkeypatch, Probes(), told)
    assert hashing.hashing().generation
    ((_, seen),) = hashing.vnet_hashes().items()
    assert seen.config and seen.config.key == bytes(lib.qs_vnet_probe_key)


@pytest.mark.parametrize("told", [None, lambda key: key[::-1]])
def test_what_cannot_be_read_back(monkeypatch: pytest.MonkeyPatch, told: Callable[[bytes], bytes] | None) -> None:
    probes = use(monkeypatch, Probes(), told)
    assert "does not show what is set" in hashing.hashing().why_not
    assert probes.ended == 1


def test_what_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = use(monkeypatch, Probes())

    def refuse(pid: int) -> bool:
        raise QsteerError("cannot look")

    monkeypatch.setattr(kernel, "vnet_hashes", refuse)
    assert hashing.hashing().why_not == "cannot look" and probes.ended == 1


@pytest.mark.parametrize("told", [bytes, _words])
def test_a_mark_tells_where_the_probe_could_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Callable[[bytes], bytes]
) -> None:
    """Who may not probe knows qsteer's RSS all the same, however a key is kept."""
    monkeypatch.setattr("qsteer.holds.RUNTIME", tmp_path)
    use(monkeypatch, Probes(result=-errno.EPERM), told)
    config = RssConfig(types=BASE_TYPES, key=bytes(lib.qs_vnet_probe_key), table=tuple(lib.qs_vnet_probe_table))
    ours = VnetHash(rss=True, report=False, types=BASE_TYPES, config=config, source=Source.STATIC)
    queue = replace(taps.queue(), netns=1, ifindex=2, vnet_hash=7)
    assert hashing.of_taps((queue,))[1, 2].source is None
    marks.file(netns=1, ifindex=2).restore(marks.of(taps.tap(), (ours,)))
    assert hashing.of_taps((queue,)) == {(1, 2): ours}
