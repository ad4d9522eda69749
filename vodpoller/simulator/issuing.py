"""Temporary keys of a role: the metadata service of a CVM, and AssumeRole of STS.

Sources: "Instance role" (product/213/47668) and "AssumeRole" (product/1312/48197).
"""

import time
from random import Random
from typing import Any, Final

import orjson

from vodpoller.simulator.errors import ApiError
from vodpoller.simulator.server import Connection, Request
from vodpoller.simulator.signature import Key

ASSUME_ROLE: Final = "AssumeRole"
METADATA_PATH: Final = "/latest/meta-data/cam/security-credentials/"
ROLE: Final = "simulated-role"

_STS_VERSION: Final = "2018-08-13"
_KEPT_KEYS: Final = 1000
_PARAMETERS: Final = frozenset(
    {"RoleArn", "RoleSessionName", "DurationSeconds", "Policy", "ExternalId", "Tags", "SourceIdentity"}
)


class Issuing:
    """Issues temporary keys, and knows those that it has issued.

    Args:
        random: Source of the keys.

    Attributes:
        issued: Number of issued keys.
    """

    def __init__(self, random: Random) -> None:
        self._random = random
        self._keys: dict[str, Key] = {}
        self.issued = 0

    def key_of(self, secret_id: str) -> Key | None:
        """The issued key with this SecretId; None if there is none."""
        return self._keys.get(secret_id)

    def answer_metadata(self, target: str, connection: Connection, *, life_secs: float, now: float) -> None:
        """Answer a request to the metadata service.

        Args:
            target: The path, which begins with `METADATA_PATH`.
            connection: The connection of the request.
            life_secs: Lifetime of a key, in seconds.
            now: Unix time, in seconds.
        """
        match target.removeprefix(METADATA_PATH):
            case "":
                connection.send(ROLE.encode(), content_type=b"text/plain")
            case name if name == ROLE:
                key, ends_at = self._issue(life_secs, now)
                members = {"ExpiredTime": ends_at, "Expiration": _iso(ends_at), "Code": "Success"}
                connection.send(orjson.dumps({**key, **members}))
            case _:
                connection.send(b"not found", status=404, content_type=b"text/plain")

    def assume_role(self, request: Request, *, life_secs: float, now: float) -> bytes:
        """Issue a key of a role. Returns the members of the answer.

        Args:
            request: The request, with a valid signature.
            life_secs: Lifetime of the key in seconds, whatever the request asks for.
            now: Unix time, in seconds.

        Raises:
            ApiError: The request is not valid for AssumeRole.
        """
        if request.headers.get("x-tc-version") != _STS_VERSION:
            raise ApiError("NoSuchVersion", f"The version of STS is {_STS_VERSION}.")
        parameters = parameters_in(request)
        if unknown := sorted(parameters.keys() - _PARAMETERS):
            raise ApiError("UnknownParameter", f"{ASSUME_ROLE} has no parameter {unknown[0]}.")
        for name in ("RoleArn", "RoleSessionName"):
            if not isinstance(parameters.get(name), str):
                raise ApiError("MissingParameter", f"{name} is missing.")
        key, ends_at = self._issue(life_secs, now)
        return orjson.dumps({"Credentials": key, "ExpiredTime": ends_at, "Expiration": _iso(ends_at)})[1:-1] + b","

    def _issue(self, life_secs: float, now: float) -> tuple[dict[str, str], int]:
        self.issued += 1
        ends_at = int(now + life_secs)
        names = ("TmpSecretId", "TmpSecretKey", "Token")
        issued = {name: f"sim{name}{self._random.getrandbits(160):040x}" for name in names}
        key = Key(secret_key=issued["TmpSecretKey"], token=issued["Token"], ends_at=ends_at)
        self._keys[issued["TmpSecretId"]] = key
        if len(self._keys) > _KEPT_KEYS:
            del self._keys[next(iter(self._keys))]
        return issued, ends_at


def parameters_in(request: Request) -> dict[str, Any]:
    """The parameters of a request to an API.

    Raises:
        ApiError: Its body is not a JSON object.
    """
    try:
        content = orjson.loads(request.body)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ApiError("InvalidParameter", "The body is not a JSON object.")
    return content


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
