"""Tests, benchmarks and soaks; see README.md."""

import sys
from pathlib import Path

# Without cached bytecode each worker compiles hypothesis and all test modules again, which takes 10 s of CPU time. If
# the environment forbids bytecode files beside the modules, they go to another folder. Programs that tests start still
# obey the environment.
if sys.dont_write_bytecode:
    sys.pycache_prefix = str(Path(__file__).parent.parent / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False
