# SPDX-License-Identifier: BSD-2-Clause
"""The manual page and the argument parser know the same verbs, options and exit codes."""

import argparse
import re
from pathlib import Path

from qsteer import cli, errors

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "qsteer.8").read_text()


def parsers() -> dict[str, argparse.ArgumentParser]:
    parser = cli.parser()
    return {"": parser, **below(parser)}


def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def test_every_verb_and_option_is_in_the_page_and_no_other() -> None:
    known = parsers()
    every = [*known.values(), *(verb for noun in known.values() for verb in below(noun).values())]
    options = {option for parser in every for action in parser._actions for option in action.option_strings}
    described = set()
    for line in PAGE.replace("\\\n", "").splitlines():
        if line.startswith(".It Fl"):
            described |= {f"-{flag}" for flag in re.findall(r"Fl (-?[a-z-]+)", line)}
    assert described == options
    verbs = PAGE[PAGE.index(".Ss Verbs") : PAGE.index(".Ss Selectors")]
    assert set(re.findall(r"^\.It Cm ([a-z-]+)$", verbs, re.MULTILINE)) == known.keys() - {""}


def test_exit_codes() -> None:
    section = PAGE[PAGE.index(".Sh EXIT STATUS") : PAGE.index(".Sh EXAMPLES")]
    described = {int(code) for code in re.findall(r"^\.It (\d)$", section, re.MULTILINE)}
    raised = {kind.exit_code for kind in errors.KINDS}
    assert described == raised | {0, 7}


def test_sources() -> None:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(".It Fl -source"))
    assert line.rpartition(" ")[2].split("|") == list(cli.SOURCES)
