"""The sink `tencent` in a daemon: it signs with the daemon's own key, also with one that was put in its place."""

import json
import signal

import pytest

from tests.polling import until
from tests.processes import SECRET_ID, SECRET_KEY
from tests.receiver import running_receiver
from tests.tencent_api import TencentApi

pytestmark = pytest.mark.system


def bodies(numbers):
    return [
        json.dumps({"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number)}}) for number in numbers
    ]


def ids_at(api):
    return sorted(int(json.loads(call.body)["Id"]) for call in list(api.calls))


def test_a_daemon_signs_with_its_own_key_and_with_a_renewed_one(system):
    with running_receiver(TencentApi("scf")) as api:
        api.key = (SECRET_ID, SECRET_KEY, None)
        simulator = system.simulator()
        sink = (
            '[sinks.function]\ntype = "tencent"\nservice = "scf"\nversion = "2018-04-16"\naction = "Invoke"\n'
            f'params = "{{Id: FileUploadEvent.FileId}}"\nendpoint = "{api.endpoint}"\nrequests_per_sec = 1000\n'
        )
        system.configure(simulator.url, sinks=sink)
        daemon = system.daemon()
        simulator.feed(*bodies(range(20)))
        until(simulator.all_confirmed, what=daemon.tail)
        assert ids_at(api) == list(range(20))
        system.key_path.write_text("another-key-in-the-same-place\n")
        daemon.signal(signal.SIGHUP)
        daemon.await_log("daemon.reloaded")
        api.key = (SECRET_ID, "another-key-in-the-same-place", None)
        simulator.feed(*bodies(range(20, 30)))
        until(simulator.all_confirmed, what=daemon.tail)
        assert ids_at(api) == list(range(30))
        assert daemon.terminate()[0] == 0
    assert daemon.problems() == []
