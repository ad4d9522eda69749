"""The exit codes, and the exit of a command that has threads."""

import os
import sys
from typing import Final, NoReturn

EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 78


def end(code: int) -> NoReturn:
    """Exit at once. A normal exit would wait for a thread that hangs in a sink.

    Args:
        code: The exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
