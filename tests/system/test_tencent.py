"""The sink `tencent` in a daemon: it signs with the daemon's own key, also after a change of the key."""

import json
import signal
import time
from itertools import count

import pytest
import requests

from tests.expiring_keys import credentials_of
from tests.polling import until
from tests.processes import SECRET_ID, SECRET_KEY, HeldPort, run_command
from tests.receiver import Answer, running_receiver
from tests.tencent_api import TencentApi


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


class RoleApi(TencentApi):
    """The stub with a temporary key, which it issues as a machine's metadata service and as STS."""

    def __init__(self, service="scf"):
        super().__init__(service)
        self.is_issuing = True
        self.numbers = count(1)
        self.issued = []
        self.renew()

    def renew(self):
        """Accept only a new token."""
        self.key = (SECRET_ID, "temporary-key-0001", f"temporary-token-{next(self.numbers):04}")

    def answer_to(self, received):
        of_metadata = received.path.startswith("/latest/meta-data/")
        if not of_metadata and received.headers.get("X-TC-Action") != "AssumeRole":
            return super().answer_to(received)
        if not self.is_issuing:
            return Answer(500)
        self.issued.append("cvm_role" if of_metadata else "assume_role")
        key = dict(zip(("TmpSecretId", "TmpSecretKey", "Token"), self.key, strict=True))
        end = {"ExpiredTime": int(time.time()) + 3600}
        answer = {**key, **end, "Code": "Success"} if of_metadata else {"Response": {"Credentials": key, **end}}
        return Answer(200, body=json.dumps(answer).encode())


def configure_callbacks(system, port, api, provider):
    """Write a configuration with a callback source only, the sink, and keys of a role."""
    credentials = credentials_of(provider, api.endpoint) + ('role = "r"\n' if provider == "cvm_role" else "")
    system.config_path.write_text(
        f'[credentials]\n{credentials}[[sources]]\nname = "pushed"\ntype = "callback"\nlisten = "127.0.0.1:{port}"\n'
        'path = "/vod"\n[[routes]]\nname = "all"\nsinks = ["function"]\n'
        '[sinks.function]\ntype = "tencent"\nservice = "scf"\nversion = "2018-04-16"\naction = "Invoke"\n'
        f'params = "{{Id: FileUploadEvent.FileId}}"\nendpoint = "{api.endpoint}"\nrequests_per_sec = 1000\n'
        f'[journal]\npath = "{system.journal}"\n[log]\nlevel = "debug"\n'
    )


def push(port, number):
    (text,) = bodies([number])
    return requests.post(f"http://127.0.0.1:{port}/vod", data=text, timeout=10).status_code


@pytest.mark.parametrize(("provider", "other"), [("cvm_role", "assume_role"), ("assume_role", "cvm_role")])
def test_a_sink_uses_the_key_of_the_role_and_has_it_renewed(system, provider, other):
    with running_receiver(RoleApi()) as api, HeldPort() as port:
        configure_callbacks(system, port.number, api, provider)
        checked = run_command("check", "--connect", "-c", system.config_path)
        assert "a key until" in checked.stdout
        assert "sinks.function" not in checked.stdout + checked.stderr
        daemon = system.daemon()
        assert push(port.number, 1) == 200
        until(lambda: ids_at(api) == [1], what=daemon.tail)
        api.renew()  # the stub refuses the former token: the sink requests another
        assert push(port.number, 2) == 200
        until(lambda: ids_at(api) == [1, 2], what=daemon.tail)
        assert set(api.issued) == {provider}
        configure_callbacks(system, port.number, api, other)
        reloaded = run_command("reload", "-c", system.config_path)
        assert reloaded.returncode == 0, reloaded.stdout + reloaded.stderr
        assert push(port.number, 3) == 200
        until(lambda: ids_at(api) == [1, 2, 3], what=daemon.tail)
        assert set(api.issued) == {provider, other}
        assert daemon.terminate()[0] == 0
    shown = daemon.log_path.read_text() + checked.stdout + checked.stderr
    assert "temporary-" not in shown


@pytest.mark.parametrize("provider", ["cvm_role", "assume_role"])
def test_a_daemon_starts_and_delivers_later_if_there_is_no_key_yet(system, provider):
    with running_receiver(RoleApi()) as api, HeldPort() as port:
        api.is_issuing = False
        configure_callbacks(system, port.number, api, provider)
        daemon = system.daemon()
        daemon.await_log("credentials.failed")
        assert push(port.number, 1) == 200  # stored
        api.is_issuing = True
        until(lambda: ids_at(api) == [1], secs=30, what=daemon.tail)
        assert daemon.terminate()[0] == 0


def test_a_given_key_whose_token_is_refused_is_read_again(system):
    with running_receiver(RoleApi()) as api, HeldPort() as port:
        configure_callbacks(system, port.number, api, "cvm_role")
        names = ("secret_id", "secret_key", "token")
        given = "".join(f'{name}_file = "{system.config_path.parent}/{name}"\n' for name in names)
        text = system.config_path.read_text()
        system.config_path.write_text(f"[credentials]\n{given}" + text[text.index("[[sources]]") :])

        def write():
            for name, value in zip(names, api.key, strict=True):
                (system.config_path.parent / name).write_text(value)

        write()
        daemon = system.daemon()
        api.renew()
        write()
        assert push(port.number, 1) == 200
        until(lambda: ids_at(api) == [1], what=daemon.tail)
        assert daemon.terminate()[0] == 0
