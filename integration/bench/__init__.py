# SPDX-License-Identifier: BSD-2-Clause
"""``make bench``: what steering costs, against ``return 0``, no program, and QEMU's own program."""
