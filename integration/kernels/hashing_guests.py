# SPDX-License-Identifier: BSD-2-Clause
"""Real guests on a kernel whose tun hashes by itself: every flow followed, by in-kernel RSS and by a program.

One guest has a NIC that ``qsteer run --engine kernel`` made, whose guest knows nothing of RSS, and one with vhost and a
QEMU (11.1) that offers RSS and never steers.
"""

import dataclasses
from typing import Any

from integration import provision
from integration.agent_guest import with_agent
from integration.kernels.guests import QEMUS
from integration.kernels.nested import PATIENTLY, Nic, unprivileged
from integration.kernels.vhost import DoesNotHoldError, Show, keep, tap_of
from qsteer.model import Engine
from qsteer.rss import BASE_TYPES, RssConfig, weighted_table

QEMU = "11.1"
IN_KERNEL = Nic(tap="qskh0", vhost=False, rss=False, passed=True)
OFFERED = Nic(tap="qskh1", vhost=True, rss=True)
_READ = ("--dev", OFFERED.tap, "--source", "device-state", "--allow", "pause", *PATIENTLY)


class InKernel(Show):
    """The phases, and what they came to."""

    def steered(self, name: str, nic: Nic, wanted: RssConfig, engine: Engine = Engine.KERNEL) -> None:
        """Raises DoesNotHoldError unless that engine steers every flow right."""
        steering = tap_of(nic).steering
        if not steering or steering.engine is not engine:
            raise DoesNotHoldError(f"{name}: steered by {steering.engine if steering else 'automq'}, not by {engine}")
        self.measure(f"{name} ({engine})", nic, wanted)

    def by_the_hosts_table(self) -> None:
        """The guest knows nothing of RSS; a reset changes nothing."""
        steering = tap_of(IN_KERNEL).steering
        assert steering and steering.config
        self.steered("qsteer run --engine kernel", IN_KERNEL, steering.config)
        self.qsteer("apply", "--dev", IN_KERNEL.tap, "--weight", "1,2,3,2")
        config = dataclasses.replace(steering.config, types=BASE_TYPES, table=weighted_table((1, 2, 3, 2)))
        self.steered("qsteer apply --weight 1,2,3,2", IN_KERNEL, config)
        self.qsteer("apply", "--dev", IN_KERNEL.tap, "--engine", "ebpf")
        self.steered("qsteer apply --engine ebpf", IN_KERNEL, config, Engine.EBPF)
        self.qsteer("apply", "--dev", IN_KERNEL.tap, "--engine", "kernel")
        self.steered("qsteer apply --engine kernel", IN_KERNEL, config)
        self.qsteer("off", "--dev", IN_KERNEL.tap)
        self.measure("qsteer off", IN_KERNEL, config, steered=False)

    def by_the_guests_table(self) -> None:
        """The guest asks, QEMU does not deliver."""
        wanted = self.vm.ethtool(OFFERED, "weight 1 2 3 2")
        self.measure("without qsteer: weight 1 2 3 2", OFFERED, wanted, steered=False)
        self.qsteer("apply", *_READ)
        self.steered("qsteer apply, device-state: weight 1 2 3 2", OFFERED, wanted)
        with keep(*_READ, "--reread", "1"):
            wanted = self.vm.ethtool(OFFERED, "equal 3")
            self.wait_for(OFFERED, wanted)
            self.steered("qsteer keep, device-state: equal 3", OFFERED, wanted)
        self.qsteer("off", "--dev", OFFERED.tap)
        self.measure("qsteer off: equal 3", OFFERED, wanted, steered=False)


def show() -> dict[str, Any]:
    """All phases.  Raises GuestError, ProvisionError, DoesNotHoldError."""
    files = provision.with_qemu(with_agent(provision.provision()), QEMUS[QEMU]())
    with unprivileged(files, "qsk-hashing", (IN_KERNEL, OFFERED), engine="kernel") as vm:
        shown = InKernel(vm)
        shown.by_the_hosts_table()
        shown.by_the_guests_table()
    return {"qemu": files.qemu_version, "phases": shown.phases}
