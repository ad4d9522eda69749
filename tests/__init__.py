"""Tests, benchmarks and soaks; see README.md."""

import sys
from pathlib import Path

# Without bytecode each worker compiles all modules of tests anew, and hypothesis, which takes 10 s of CPU time. If the
# environment forbids it beside the modules, it goes elsewhere. Programs that tests start keep to what is forbidden.
if sys.dont_write_bytecode:
    sys.pycache_prefix = str(Path(__file__).parent.parent / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False
