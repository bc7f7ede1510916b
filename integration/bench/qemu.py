# SPDX-License-Identifier: BSD-2-Clause
"""QEMU's own steering program, as a QEMU hands it out (``request-ebpf``, QEMU 9.0 and later)."""

import base64
import json
import subprocess
from pathlib import Path

from integration.apt import ProvisionError


def steering_object(qemu: Path) -> bytes:
    """The ELF object.  Raises ProvisionError if this QEMU has none."""
    orders = (
        {"execute": "qmp_capabilities"},
        {"execute": "request-ebpf", "arguments": {"id": "rss"}},
        {"execute": "quit"},
    )
    argv = (str(qemu), "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio")
    text = "\n".join(json.dumps(order) for order in orders)
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=30, check=False)
        answers = [json.loads(line).get("return") for line in done.stdout.splitlines()]
        return next(base64.b64decode(answer["object"]) for answer in answers if answer and "object" in answer)
    except (OSError, subprocess.TimeoutExpired, ValueError, StopIteration):
        raise ProvisionError(f"{qemu} does not hand out its steering program (request-ebpf)") from None
