"""The API key as one triple: files that are swapped while they are read."""

import pytest

from vodpoller.secret import FORMER_MAX, Secret
from vodpoller.vod.credentials import Credentials, StaticCredentials


@pytest.fixture
def key_in(tmp_path):
    """A function that writes a key and swaps the link `data` to it, as Kubernetes mounts secrets; key 0 is there."""

    def swap(number):
        folder = tmp_path / f"of-{number}"
        folder.mkdir(exist_ok=True)
        for name in ("secret_id", "secret_key", "token"):
            (folder / name).write_text(f"{name}-{number}\n")
        link = tmp_path / "new"
        link.symlink_to(folder.name)
        link.rename(tmp_path / "data")

    swap(0)
    return swap


class SwappedSecret(Secret):
    """A secret whose file is swapped after each read, as long as there are `swaps`."""

    swaps = ()

    def read(self):
        value = super().read()
        if self.swaps:
            self.swaps.pop(0)()
        return value


def credentials_in(folder, kind=Secret):
    return StaticCredentials(
        secret_id=kind(path=folder / "secret_id"),
        secret_key=Secret(path=folder / "secret_key"),
        token=Secret(path=folder / "token"),
    )


def triple(number):
    return Credentials(*(f"{name}-{number}" for name in ("secret_id", "secret_key", "token")))


def test_files_swapped_between_two_readings_are_one_triple(tmp_path, key_in):
    credentials = credentials_in(tmp_path / "data", SwappedSecret)
    credentials.secret_id.swaps = [lambda: key_in(1), lambda: key_in(2)]
    credentials.reread()
    assert credentials() == triple(2)


def test_files_that_keep_changing_leave_the_last_triple(tmp_path, key_in):
    credentials = credentials_in(tmp_path / "data", SwappedSecret)
    credentials.secret_id.swaps = [lambda at=at: key_in(at) for at in range(1, 20)]
    with pytest.raises(OSError, match="keep changing"):
        credentials.reread()
    assert credentials() == triple(0)


@pytest.mark.parametrize("name", ["secret_id", "secret_key", "token"])
def test_one_file_that_is_missing_keeps_all_of_the_last_triple(tmp_path, key_in, name):
    credentials = credentials_in(tmp_path / "data")
    key_in(1)
    (tmp_path / "data" / name).unlink()
    with pytest.raises(FileNotFoundError):
        credentials.reread()
    assert credentials() == triple(0)


def test_a_secret_that_was_replaced_stays_known_for_a_while(tmp_path):
    path = tmp_path / "key"
    path.write_text("value-0")
    secret = Secret(path=path)
    for number in range(1, 20):
        path.write_text(f"value-{number}")
        secret.reread()
        secret.reread()
    assert secret.known() == tuple(f"value-{number}" for number in range(19, 18 - FORMER_MAX, -1))
