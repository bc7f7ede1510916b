# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer`` and ``python -m qsteer``."""

import os
import sys

from qsteer.errors import QsteerError, printable


def main() -> int:
    """Run the command line; every failure is one line, a hint, and an exit code of qsteer.errors."""
    from qsteer.cli import command

    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
        return code
    except QsteerError as error:
        print(f"qsteer: {printable(str(error))}", file=sys.stderr)
        if error.hint:
            print(f"hint: {printable(error.hint)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone; nothing must be written to it at exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
