# SPDX-License-Identifier: BSD-2-Clause
from typing import Any

# cffi makes these at build time, out of the declarations in shim_build.py; they are only used in kernel.py.
ffi: Any
lib: Any
