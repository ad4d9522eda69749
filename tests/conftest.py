import functools
import logging
import os
import signal
import sys
from importlib.metadata import entry_points
from itertools import accumulate, groupby
from operator import attrgetter, itemgetter
from pathlib import Path

import certifi
import pytest
from hypothesis import settings

from tests.certificates import make_certificate
from tests.helpers import FakeClock, log_into
from tests.receiver import running_receiver
from vodpoller.logs import CATALOGUE
from vodpoller.sinks import registry

# A shell lets what it starts in the background ignore SIGINT, and nohup SIGHUP; what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# `--hypothesis-profile thorough` takes hours; see tests/README.md.
settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("quick")


def pytest_xdist_auto_num_workers(config):
    """For `-n auto`: tests of processes wait more than they compute, except the long ones."""
    return (2 if config.option.markexpr in {"long", "not system"} else 4) * (os.cpu_count() or 1)


ONLY_SYSTEM = {Path(__file__).parent / name for name in ("model", "sinks", "system")}
STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}


STARTING = {"certificate", "system", "tls_receiver"}  # fixtures, wherever they are defined


@pytest.hookimpl(tryfirst=True)  # before -m is obeyed
def pytest_collection_modifyitems(items):
    for path, tests in groupby(items, key=attrgetter("path")):
        is_system = not ONLY_SYSTEM.isdisjoint(path.parents)
        for item in tests:
            if is_system or not STARTING.isdisjoint(item.fixturenames):
                item.add_marker(pytest.mark.system)
    items[:] = spread(items)


def pytest_ignore_collect(collection_path, config):
    """Do not import the folders of which `-m "not system"` deselects every test."""
    return True if config.option.markexpr == "not system" and collection_path in ONLY_SYSTEM else None


def spread(items):
    """The modules of tests/system evenly among the others, so that no process of `-n auto` gets only such as wait."""
    parts = {True: [], False: []}
    for _, tests in groupby(items, key=attrgetter("path")):
        module = list(tests)
        parts["system" in module[0].path.parts].append(module)
    placed = []
    for modules in parts.values():
        before = [0, *accumulate(len(module) for module in modules)]
        placed += [(number / before[-1], module) for number, module in zip(before, modules, strict=False)]
    return [item for _, module in sorted(placed, key=itemgetter(0)) for item in module]


class Guard:
    """Keeps the mark `system` true: a test without it starts no process."""

    def __init__(self):
        self.forbids = False

    def __call__(self, action, _arguments):
        if self.forbids and action in STARTS:
            raise RuntimeError(f"{action}: a test that starts a process is to be marked with pytest.mark.system")


guard = Guard()
sys.addaudithook(guard)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    guard.forbids = item.get_closest_marker("system") is None
    try:
        return (yield)
    finally:
        guard.forbids = False


@pytest.fixture(scope="session", autouse=True)
def read_once(tmp_path_factory):
    """What hundreds of tests would read, each for some of its time: one public CA stands for all of them, and the sinks
    that are installed stay the same while `sys.path` does."""
    end = "-----END CERTIFICATE-----\n"
    one = tmp_path_factory.mktemp("roots") / "one.pem"
    one.write_text(Path(certifi.where()).read_text(encoding="utf-8").partition(end)[0] + end, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("requests.utils.DEFAULT_CA_BUNDLE_PATH", str(one))
        read = functools.cache(lambda _path, **selection: entry_points(**selection))
        patched.setattr(registry, "entry_points", lambda **selection: read(tuple(sys.path), **selection))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_roots_of_the_machine():
    with pytest.MonkeyPatch.context() as patched:
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            patched.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def no_handlers_left():
    """Undo what `make_logger` sets for the process: its handler would write to a descriptor that others then have."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def log(lines):
    """A logger whose lines are in `lines`; each must be of the catalogue."""
    yield log_into(lines)
    assert {line["event"] for line in lines} <= set(CATALOGUE)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def receiver():
    """A webhook's receiver, which accepts at first."""
    with running_receiver() as running:
        yield running
