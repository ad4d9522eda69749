"""`python -m tests.as_nobody ARGS`: vodpoller's command line as a user that owns nothing.

That user may have no right to read the interpreter's folder, so all modules are imported before the rights are dropped.
"""

import codecs
import importlib
import os
import pkgutil

import vodpoller
from vodpoller.cli.app import main
from vodpoller.sinks.registry import available_sinks

NOBODY = 65534
READ_LATER = ("concurrent.futures.thread", "rich.progress", "rich.table")

if __name__ == "__main__":
    for name in (*READ_LATER, *(found.name for found in pkgutil.walk_packages(vodpoller.__path__, "vodpoller."))):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    available_sinks()
    for encoding in ("ascii", "idna", "latin-1", "utf-8-sig"):
        codecs.lookup(encoding)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    main()
