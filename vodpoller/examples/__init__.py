"""The files that `vodpoller example NAME` prints: one file in this folder and one entry below for each.

Files whose place is elsewhere in the repository are links here. So there is one copy of each, both in a wheel and in an
editable installation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One file.

    Args:
        file: Its name in this folder.
        about: What the file is and where it belongs, as part of a sentence.
    """

    file: str
    about: str

    def read(self) -> bytes:
        """The file as it is."""
        return files(__name__).joinpath(self.file).read_bytes()


EXAMPLES: Final[Mapping[str, Example]] = {
    "alerts": Example(file="alerts.yml", about="alerting rules for Prometheus; for its `rule_files`"),
    "config": Example(
        file="config.example.toml", about="the configuration, with every key explained; for /etc/vodpoller/config.toml"
    ),
    "containerfile": Example(
        file="Containerfile", about="an image of vodpoller; to build in the folder of its sources"
    ),
    "dashboard": Example(file="dashboard.json", about="a dashboard for Grafana; to import there"),
    "logrotate": Example(
        file="vodpoller.logrotate", about="rotates the files of sinks; for /etc/logrotate.d/vodpoller"
    ),
    "socket": Example(
        file="vodpoller.socket",
        about="the port for callbacks, open during restarts; for /etc/systemd/system/vodpoller.socket",
    ),
    "sql": Example(file="tables.sql", about="the tables of the sinks postgresql, mysql and sqlite, for a database"),
    "unit": Example(file="vodpoller.service", about="the service; for /etc/systemd/system/vodpoller.service"),
    "unit@": Example(
        file="vodpoller@.service", about="several services on one machine; for /etc/systemd/system/vodpoller@.service"
    ),
}
