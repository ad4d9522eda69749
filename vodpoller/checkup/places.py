"""The files that a configuration writes."""

from pathlib import Path
from typing import Final

from vodpoller.config.model import Config

_FILE_CLAIM: Final = "file:"


def files_of_sinks(config: Config) -> list[Path]:
    """The files that sinks write, by their real paths.

    Args:
        config: Valid.
    """
    written = sorted({claim for sink in config.sinks.values() for claim in sink.claims() | sink.shares()})
    return [Path(claim.removeprefix(_FILE_CLAIM)) for claim in written if claim.startswith(_FILE_CLAIM)]
