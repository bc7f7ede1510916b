# SPDX-License-Identifier: BSD-2-Clause
"""tun as a module: what looks at taps is loaded again when the driver was, and not while there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qsteer import kernel


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the driver's directory in sysfs, which is not there yet; a new one has another inode number."""
    monkeypatch.setattr(kernel, "_TUN_DRIVER", tmp_path / "tun")
    monkeypatch.setattr(kernel, "_loaded", {})
    return tmp_path / "tun"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was loaded; each load gives another object."""
    names: list[str] = []

    def load(name: str) -> str:
        names.append(name)
        return f"{name} {len(names)}"

    monkeypatch.setattr(kernel, "_load", load)
    return names


def test_without_a_driver_nothing_is_loaded(driver: Path, loads: list[str]) -> None:
    assert (kernel.open_queues(), kernel.digest(), kernel.holders_digest()) == ((), 0, 0)
    assert loads == []


def test_loaded_once_as_long_as_the_driver_stays(driver: Path, loads: list[str]) -> None:
    driver.mkdir()
    assert [kernel._look_with("a"), kernel._look_with("a"), kernel._look_with("b")] == ["a 1", "a 1", "b 2"]
    assert loads == ["a", "b"]


def test_loaded_again_for_another_driver(driver: Path, loads: list[str]) -> None:
    driver.mkdir()
    assert kernel._look_with("a") == "a 1"
    driver.rename(driver.with_name("old"))
    assert kernel._look_with("a") is None
    driver.mkdir()
    assert kernel._look_with("a") == "a 2"
    driver.rename(driver.with_name("older"))
    driver.mkdir()
    assert kernel._look_with("a") == "a 3"


def test_a_load_that_failed_is_tried_again(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.mkdir()
    answers: Iterator[OSError | str] = iter([OSError(), "loaded"])

    def load(name: str) -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(kernel, "_load", load)
    with pytest.raises(OSError):
        kernel._look_with("a")
    assert kernel._look_with("a") == "loaded"


def test_whose_structures_are_not_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_BTF", tmp_path)
    monkeypatch.setattr(kernel, "_TUN_IS_MODULE", tmp_path / "initstate")
    assert kernel._not_described() == f"this kernel has no BTF ({tmp_path}/vmlinux is missing)"
    (tmp_path / "vmlinux").write_text("")
    assert kernel._not_described() == ""
    (tmp_path / "initstate").write_text("live\n")
    assert kernel._not_described() == f"tun is a module without BTF ({tmp_path}/tun is missing)"
    (tmp_path / "tun").write_text("")
    assert kernel._not_described() == ""
