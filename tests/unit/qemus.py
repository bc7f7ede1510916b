# SPDX-License-Identifier: BSD-2-Clause
"""A QEMU made of a few lines of Python, for the QMP edge; this very process listens on its socket."""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}

Answer = Callable[[Mapping[str, object]], object]


class Refusal(Exception):
    """What an answer raises to be refused; ``args`` are class and text of QMP's error."""


class HangUp(Exception):
    """What an answer raises to end the session."""


class FakeQemu(threading.Thread):
    """Serves clients one after the other, as QEMU does.

    ``answers`` holds, by command, what to return, or a function of the arguments that does.  ``commands`` are those
    that came, without qmp_capabilities.  ``said`` is sent as it is before an answer.
    """

    def __init__(self, path: Path, answers: Mapping[str, object]) -> None:
        super().__init__(daemon=True)
        self.answers = dict(answers)
        self.commands: list[str] = []
        self.arguments: list[Mapping[str, object]] = []
        self.fds: list[int] = []
        self.said: list[object] = []
        self.greeting: object = GREETING
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            # A client that goes away early is none of our failures.
            with contextlib.suppress(OSError, HangUp), client:
                self._serve(client)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.join()
        self._listener.close()
        for fd in self.fds:
            os.close(fd)

    def say(self, event: str, seconds: float) -> None:
        """An event, before the next answer."""
        whole, fraction = divmod(seconds, 1)
        stamp = {"seconds": int(whole), "microseconds": round(fraction * 1e6)}
        self.said.append({"event": event, "timestamp": stamp})

    def _serve(self, client: socket.socket) -> None:
        self._send(client, self.greeting)
        pending = ""
        while True:
            data, fds, _, _ = socket.recv_fds(client, 65536, 4)
            self.fds += fds
            if not data:
                return
            pending += data.decode()
            while pending := pending.lstrip():
                try:
                    message, end = json.JSONDecoder().raw_decode(pending)
                except ValueError:
                    break
                pending = pending[end:]
                answer = self._answer(message)
                for line in self.said:
                    self._send(client, line)
                self.said.clear()
                self._send(client, answer | {key: message[key] for key in ("id",) if key in message})

    def _answer(self, message: Mapping[str, object]) -> dict[str, object]:
        command, arguments = str(message["execute"]), message.get("arguments", {})
        if command == "qmp_capabilities":
            return {"return": {}}
        assert isinstance(arguments, dict)
        self.commands.append(command)
        self.arguments.append(arguments)
        try:
            if command not in self.answers:
                raise Refusal("CommandNotFound", f"The command {command} has not been found")
            answer = self.answers[command]
            return {"return": answer(arguments) if callable(answer) else answer}
        except Refusal as refusal:
            return {"error": {"class": refusal.args[0], "desc": refusal.args[1]}}

    def _send(self, client: socket.socket, message: object) -> None:
        client.sendall(json.dumps(message).encode() + b"\r\n")
