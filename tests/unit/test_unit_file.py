"""systemd/: what the units promise, and that systemd itself finds nothing wrong with them."""

import ipaddress
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.processes import needs
from vodpoller.cli.app import main
from vodpoller.cli.configuration import DEFAULT_CONFIG
from vodpoller.cli.exits import EXIT_CONFIG
from vodpoller.config.tables import TABLES

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd" / "vodpoller.service"
JOB = UNIT.with_name("once.conf")
TIMER = UNIT.with_name("vodpoller.timer")
SOCKET = UNIT.with_name("vodpoller.socket")
INSTANCES = UNIT.with_name("vodpoller@.service")
SECS = {"": 1, "s": 1, "sec": 1, "min": 60}


def parsed(text):
    """All values of each setting by (section, name); an empty one resets, as in systemd.syntax(7)."""
    settings = defaultdict(list)
    section = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if line.startswith("["):
            section = line.strip("[] ")
            continue
        name, _, value = line.partition("=")
        settings[section, name] += [value]
    return settings


@pytest.fixture(scope="module")
def unit():
    return parsed(UNIT.read_text())


def secs(unit, name):
    number, measure = re.fullmatch(r"(\d+)(\w*)", unit["Service", name][-1]).groups()
    return int(number) * SECS[measure]


def systemd_analyze(*words):
    needs("systemd-analyze")
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *words], capture_output=True, text=True, check=False, timeout=60
    )


def with_stub(text):
    """The unit as it can be verified on a machine where vodpoller is not installed."""
    return re.sub(r"^(ExecStart|ExecReload)=\S+", r"\1=/bin/true", text, flags=re.MULTILINE)


# --- what makes a failure worse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ExecStartPre", "ExecCondition"])
def test_nothing_runs_before_the_program_as_its_failure_would_be_repeated_for_ever(unit, name):
    assert ("Service", name) not in unit


def test_what_a_person_must_mend_is_not_restarted(unit):
    assert unit["Service", "RestartPreventExitStatus"] == [f"{EXIT_CONFIG} 243"]


def test_everything_else_is_restarted_for_as_long_as_it_takes(unit):
    assert unit["Service", "Restart"] == ["on-failure"]
    assert unit["Service", "RestartSec"] == ["5"]
    assert unit["Unit", "StartLimitIntervalSec"] == ["0"]


def test_a_stop_is_not_cut_off_while_the_daemon_still_settles(unit):
    assert secs(unit, "TimeoutStopSec") == 40
    assert TABLES["daemon"]().shutdown_secs + 10 <= secs(unit, "TimeoutStopSec")


def test_programs_of_a_sink_may_finish_during_a_stop(unit):
    assert unit["Service", "KillMode"] == ["mixed"]


def test_a_busy_machine_is_not_taken_for_a_hang(unit):
    assert secs(unit, "WatchdogSec") == 60


def test_a_start_may_take_minutes(unit):
    assert secs(unit, "TimeoutStartSec") == 300


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RestartSec", "starts it again after {} s"),
        ("StateDirectory", "can write nothing but `/var/lib/{}`"),
        ("RestartPreventExitStatus", "exit code {}"),
        ("RestartPreventExitStatus", "status {}"),
    ],
)
def test_the_readme_says_what_the_unit_says(unit, name, said):
    readme = " ".join((ROOT / "systemd" / "README.md").read_text().split())
    assert any(said.format(value) in readme for value in unit["Service", name][-1].split())


def test_a_dump_of_memory_cannot_leak_the_key(unit):
    assert unit["Service", "LimitCORE"] == ["0"]


def test_the_journal_drops_no_line_at_full_speed(unit):
    assert unit["Service", "LogRateLimitIntervalSec"] == ["0"]


@pytest.mark.parametrize("name", ["StandardOutput", "StandardError", "SyslogLevelPrefix"])
def test_lines_go_to_the_journal_which_reads_their_priority(unit, name):
    assert ("Service", name) not in unit


# --- how it runs ------------------------------------------------------------------------------------------------------


def test_it_runs_the_daemon_with_the_documented_paths(unit):
    assert unit["Service", "ExecStart"] == ["/opt/vodpoller/venv/bin/vodpoller run -c /etc/vodpoller/config.toml"]
    assert str(DEFAULT_CONFIG) in unit["Service", "ExecStart"][0]


def test_systemd_waits_until_it_is_ready(unit):
    assert unit["Service", "Type"] == ["notify"]


def test_reload_asks_the_daemon_so_that_it_can_fail(unit):
    (run,) = unit["Service", "ExecStart"]
    assert unit["Service", "ExecReload"] == [run.replace(" run ", " reload ")]


def test_it_has_a_user_and_a_state_directory_of_its_own(unit):
    assert unit["Service", "DynamicUser"] == ["yes"]
    assert unit["Service", "StateDirectory"] == ["vodpoller"]
    assert Path(TABLES["journal"]().path).parent == Path("/var/lib/vodpoller")


def test_the_key_comes_as_credentials(unit):
    assert unit["Service", "LoadCredential"] == [
        "secret_id:/etc/vodpoller/secret_id",
        "secret_key:/etc/vodpoller/secret_key",
    ]


def test_it_starts_at_boot_once_the_network_is_there(unit):
    assert unit["Install", "WantedBy"] == ["multi-user.target"]
    assert unit["Unit", "Wants"] == unit["Unit", "After"] == ["network-online.target"]


def test_it_may_use_the_network(unit):
    assert set(unit["Service", "RestrictAddressFamilies"][0].split()) == {"AF_INET", "AF_INET6", "AF_UNIX"}
    assert ("Service", "PrivateNetwork") not in unit


def denies(unit, address):
    networks = map(ipaddress.ip_network, unit["Service", "IPAddressDeny"][-1].split())
    return any(ipaddress.ip_address(address) in network for network in networks)


@pytest.mark.parametrize("address", ["169.254.0.23", "100.100.100.200", "fd00:ec2::254"])
def test_it_cannot_fetch_the_keys_of_its_machine(unit, address):
    assert denies(unit, address)


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("127.0.0.53", id="resolver of this machine"),
        pytest.param("183.60.83.19", id="name server of Tencent Cloud"),
        pytest.param("169.254.169.254", id="name server of Google and Oracle"),
        pytest.param("169.254.20.10", id="name server of a Kubernetes node"),
        pytest.param("10.0.0.1", id="receiver in a private network"),
        pytest.param("fe80::1", id="router"),
    ],
)
def test_it_may_connect_to_all_that_it_needs(unit, address):
    assert not denies(unit, address)


@pytest.mark.parametrize("name", ["MemoryDenyWriteExecute", "ProcSubset", "NoExecPaths"])
def test_a_sink_may_run_any_program(unit, name):
    assert ("Service", name) not in unit


@pytest.mark.parametrize("name", ["MemoryMax", "TasksMax", "LimitNOFILE", "OOMPolicy"])
def test_it_has_a_limit(unit, name):
    assert len(unit["Service", name]) == 1


# --- a job instead of the service -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job():
    """The settings of the unit with the drop-in that makes it a job."""
    return parsed(UNIT.read_text() + JOB.read_text())


def test_the_job_runs_once_with_the_services_configuration(unit, job):
    (command,) = unit["Service", "ExecStart"]
    assert job["Service", "ExecStart"] == [command, "", command.replace(" run ", " once ")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("Type", "exec", id="neither notifies nor has to end within the time of a start"),
        pytest.param("Restart", "no", id="comes again by the timer only"),
        pytest.param("WatchdogSec", "0", id="reports nothing in between"),
        pytest.param("RuntimeMaxSec", "1h", id="ends, even if it hangs"),
    ],
)
def test_the_job_does_without_what_only_a_daemon_does(job, name, value):
    assert job["Service", name][-1] == value


def test_all_else_that_the_job_has_is_the_services(unit, job):
    changed = {name for name in job if job[name] != unit.get(name)}
    names = ("Type", "ExecStart", "Restart", "WatchdogSec", "RuntimeMaxSec")
    assert changed == {("Service", name) for name in names}


def test_the_timer_starts_the_unit_of_its_name_every_5_minutes():
    timer = parsed(TIMER.read_text())
    assert ("Timer", "Unit") not in timer
    assert timer["Timer", "OnCalendar"] == ["*:0/5"]
    assert timer["Install", "WantedBy"] == ["timers.target"]


@pytest.mark.parametrize("path", [JOB, TIMER], ids=lambda path: path.name)
def test_the_readme_installs_what_the_job_needs(path):
    assert f" systemd/{path.name} /etc/systemd/system/" in (ROOT / "systemd" / "README.md").read_text()


# --- several instances ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def instances():
    return parsed(INSTANCES.read_text())


@pytest.mark.parametrize("name", ["ExecStart", "StateDirectory", "LoadCredential"])
def test_an_instance_shares_nothing_with_another(instances, name):
    assert all("%i" in value for value in instances["Service", name])


def test_the_folder_of_an_instance_is_not_inside_that_of_the_service(unit, instances):
    (of_service,), (of_instance,) = unit["Service", "StateDirectory"], instances["Service", "StateDirectory"]
    assert of_instance == f"{of_service}-%i"


def test_all_else_of_an_instance_is_as_in_the_service(unit, instances):
    """A change of one unit belongs into the other, too."""
    text = INSTANCES.read_text()
    for of_instance, of_service in (
        ("vodpoller %i,", "vodpoller,"),
        ("/etc/vodpoller/%i.toml", "/etc/vodpoller/config.toml"),
        ("/etc/vodpoller/%i/", "/etc/vodpoller/"),
        ("=vodpoller-%i\n", "=vodpoller\n"),
    ):
        assert of_instance in text
        text = text.replace(of_instance, of_service)
    assert parsed(text) == unit
    assert [*parsed(text)] == [*unit]


def test_the_readme_says_where_an_instance_has_its_things(instances):
    readme = (ROOT / "systemd" / "README.md").read_text()
    (state,) = instances["Service", "StateDirectory"]
    assert f"/var/lib/{state.replace('%i', 'NAME')}/journal.db" in readme
    for credential in instances["Service", "LoadCredential"]:
        assert credential.partition(":")[2].replace("%i", "NAME") in readme
    assert f" systemd/{INSTANCES.name} /etc/systemd/system/" in readme


@pytest.mark.system
@pytest.mark.parametrize(
    ("edit", "said"), [(lambda text: text, ""), (lambda text: text.replace("\nKill", "\nUnKill"), "UnKill")]
)
def test_systemd_judges_the_unit_of_an_instance(tmp_path, edit, said):
    path = tmp_path / INSTANCES.name.replace("@", "@one")
    path.write_text(edit(with_stub(INSTANCES.read_text())))
    checked = systemd_analyze("verify", "--recursive-errors=yes", str(path))
    assert said in checked.stderr
    assert (checked.stderr == "") == (said == "")


# --- the socket of callbacks ------------------------------------------------------------------------------------------


@pytest.mark.system
@pytest.mark.parametrize(
    ("edit", "said"), [(lambda text: text, ""), (lambda text: text.replace("\nBacklog", "\nUnBacklog"), "UnBacklog")]
)
def test_systemd_judges_the_socket(tmp_path, edit, said):
    (tmp_path / UNIT.name).write_text(with_stub(UNIT.read_text()))
    (tmp_path / SOCKET.name).write_text(edit(SOCKET.read_text()))
    checked = systemd_analyze("verify", "--recursive-errors=yes", *(str(it) for it in tmp_path.iterdir()))
    assert said in checked.stderr
    assert (checked.stderr == "") == (said == "")


# --- systemd's own judgement ------------------------------------------------------------------------------------------


def verified(folder, edit=lambda text: text):
    """What systemd says about the service, about the job in its place and about the timer, edited, in a folder."""
    (folder / "vodpoller.service.d").mkdir()
    for path in (UNIT, TIMER):
        (folder / path.name).write_text(edit(with_stub(path.read_text())))
    alone = systemd_analyze("verify", "--recursive-errors=yes", str(folder / UNIT.name))
    (folder / "vodpoller.service.d" / JOB.name).write_text(edit(with_stub(JOB.read_text())))
    both = systemd_analyze("verify", "--recursive-errors=yes", *(str(folder / path.name) for path in (UNIT, TIMER)))
    return alone.returncode, both.returncode, alone.stdout + alone.stderr + both.stdout + both.stderr


@pytest.mark.system
@pytest.mark.parametrize("name", ["TimeoutStopSec", "Type=exec", "OnCalendar"])
def test_the_check_notices_what_is_wrong_in_each_file(tmp_path, name):
    """Verifying means something: a misspelt setting does not pass."""
    assert (
        f"Un{name.partition('=')[0]}" in verified(tmp_path, lambda text: text.replace(f"\n{name}", f"\nUn{name}"))[-1]
    )


@pytest.mark.system
def test_systemd_finds_nothing_wrong_with_any(tmp_path):
    assert verified(tmp_path) == (0, 0, "")


@pytest.mark.system
def test_its_exposure_is_at_most_one_and_a_half():
    checked = systemd_analyze("security", "--offline=true", "--threshold=15", str(UNIT))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", checked.stdout)[1]) <= 1.5


# --- what the unit counts on ------------------------------------------------------------------------------------------


def test_a_configuration_that_the_services_user_may_not_read_is_one_to_mend_not_to_retry(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text("")
    monkeypatch.setattr(os, "access", lambda *_words, **_named: False)
    monkeypatch.setattr(Path, "read_text", denied)
    ended = CliRunner().invoke(main, ["check", "-c", str(path)])
    assert ended.exit_code == EXIT_CONFIG
    assert f"{path}: cannot be read: Permission denied" in ended.output


def denied(path, *_words, **_named):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.system
@pytest.mark.parametrize("in_journal", [True, False])
def test_what_stops_a_start_is_an_error_in_the_journal(tmp_path, in_journal):
    reader, writer = os.pipe()
    with os.fdopen(reader, encoding="utf-8") as stderr, os.fdopen(writer, "wb") as sent:
        status = os.fstat(sent.fileno())
        env = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not in_journal)}"}
        command = [sys.executable, "-m", "vodpoller", "run", "-c", str(tmp_path / "none.toml")]
        assert subprocess.run(command, stderr=sent, env=env, check=False, timeout=60).returncode == EXIT_CONFIG
        sent.close()
        assert stderr.read().startswith("<3>vodpoller: " if in_journal else "vodpoller: ")
