# SPDX-License-Identifier: BSD-2-Clause
"""The steering programs of a host, each looked at once.

What is gone again by then, or may not be looked at, is None or empty.
"""

from qsteer import hashing, procs, programs
from qsteer.errors import QsteerError
from qsteer.model import Held, Kind, MapsContent, OpenQueue, ProgramInfo, Tap


def tap_of(queue: OpenQueue) -> Tap:
    """A tap as one of its queues shows it, with what steers it, and nothing of who has it.  Raises QsteerError."""
    seen = Programs()
    program = seen.info(queue.program_id)
    return Tap(
        name=queue.tap,
        ifindex=queue.ifindex,
        netns=queue.netns,
        active=queue.active,
        disabled=queue.disabled,
        multi_queue=queue.multi_queue,
        persistent=queue.persistent,
        queues=(queue,),
        program_id=queue.program_id,
        program=program,
        content=seen.content(program),
        body_present=seen.body_present(program),
        vnet_hash=hashing.of_taps((queue,)).get((queue.netns, queue.ifindex)),
        hashing=hashing.hashing(),
    )


class Programs:
    """Programs as they are while this is used."""

    def __init__(self) -> None:
        self._infos: dict[int, ProgramInfo | None] = {}
        self._contents: dict[int, MapsContent | None] = {}
        self._bodies: dict[int, bool] = {}
        self._held: dict[int, tuple[Held, ...]] = {}
        self._holders: dict[int, tuple[int, ...]] | None = None

    def info(self, program_id: int) -> ProgramInfo | None:
        """A program by its id; None for 0, too."""
        if program_id and program_id not in self._infos:
            try:
                self._infos[program_id] = programs.program_info(program_id)
            except QsteerError:
                self._infos[program_id] = None
        return self._infos.get(program_id)

    def content(self, program: ProgramInfo | None) -> MapsContent | None:
        """The configuration that it works with."""
        if not program or not program.has_config:
            return None
        if program.id not in self._contents:
            try:
                self._contents[program.id] = programs.read_maps(program)
            except QsteerError:
                self._contents[program.id] = None
        return self._contents[program.id]

    def body_present(self, program: ProgramInfo | None) -> bool:
        """Whether a stub of qsteer's has its body, as far as can be seen."""
        if not program or program.kind is not Kind.QSTEER or not program.bodies_id:
            return True
        if program.bodies_id not in self._bodies:
            try:
                self._bodies[program.bodies_id] = programs.body_present(program)
            except QsteerError:
                self._bodies[program.bodies_id] = True
        return self._bodies[program.bodies_id]

    def holders(self, program: ProgramInfo | None) -> tuple[int, ...]:
        """Who may have attached a foreign program: the kernel does not keep it, but whoever has it open may tell."""
        if not program or program.kind is not Kind.FOREIGN:
            return ()
        if self._holders is None:
            self._holders = procs.holders_of_programs()
        return self._holders.get(program.id, ())

    def held(self, pid: int, files: procs.OpenFiles | None) -> tuple[Held, ...]:
        """The programs with QEMU's maps that a process has open."""
        if files and pid not in self._held:
            found = ((fd, self.info(program_id)) for program_id, fd in files.programs.items())
            self._held[pid] = tuple(
                Held(fd=fd, info=info, content=self.content(info)) for fd, info in found if info and info.has_maps
            )
        return self._held.get(pid, ())
