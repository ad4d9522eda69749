"""How a command ends."""

import os
import sys
from typing import Final, NoReturn

EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 78


def end(code: int) -> NoReturn:
    """Exit; a thread that hangs in a sink must not hold the exit, as the interpreter's own end would let it.

    Args:
        code: The exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
