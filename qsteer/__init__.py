# SPDX-License-Identifier: BSD-2-Clause
"""qsteer decides which queue of a virtual machine's NIC every packet lands on."""

import logging

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())
