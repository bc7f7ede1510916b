# SPDX-License-Identifier: BSD-2-Clause
"""The same code on other kernels: stock distribution kernels, booted in QEMU over the running system's user land."""
