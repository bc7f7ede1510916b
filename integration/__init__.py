# SPDX-License-Identifier: BSD-2-Clause
"""The integration floor: real QEMU guests, real taps, every flow followed by itself."""
