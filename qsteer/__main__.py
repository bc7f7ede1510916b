# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer`` and ``python -m qsteer``."""

import io
import os
import sys

from qsteer.errors import QsteerError, printable


def main() -> int:
    """Run the command line; every failure is one line, a hint, and an exit code of qsteer.errors."""
    from qsteer.cli import command

    # Names and arguments of other people's making are printed, not refused.  A stream that the caller closed is None.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command(sys.argv[1:])
        print(end="", flush=True)
        return code
    except QsteerError as error:
        print(f"qsteer: {printable(str(error))}", file=sys.stderr)
        if error.hint:
            print(f"hint: {printable(error.hint)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Nobody reads the output, or there is no room for it: nothing must be written to it at exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"qsteer: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
