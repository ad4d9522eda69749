"""Find the API key: in the configuration, under `$CREDENTIALS_DIRECTORY`, or in the environment."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vodpoller.config.draft import Draft
from vodpoller.config.tables import CredentialsTable
from vodpoller.config.validation import Validation
from vodpoller.config.wording import problem_in_key, quoted
from vodpoller.secret import ConfigContext, Secret
from vodpoller.vod.credentials import AssumedRole, CvmRole, Role, StaticCredentials

KEYS_OF_ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "cvm_role": ("role", "metadata_endpoint"),
    "assume_role": (
        "role_arn",
        "role_session_name",
        "duration_secs",
        "external_id",
        "sts_endpoint",
        "sts_region",
    ),
}
KEYS_OF_A_GIVEN_KEY: Final = ("secret_id", "secret_id_file", "secret_key", "secret_key_file", "token", "token_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCredentials:
    """The credentials that sign requests.

    Args:
        key: The given API key; an empty one if no key is given and none is needed.
        role: The role whose temporary keys are used instead; None if `key` itself signs requests.
    """

    key: StaticCredentials
    role: Role | None = None


def find_credentials(draft: Draft, validation: Validation, *, needs_key: bool) -> FoundCredentials | None:
    """Find the API key, and the role if there is one. Returns None if there is a problem with them.

    Args:
        draft: The table and the environment.
        validation: Validates the table.
        needs_key: False if the caller will not call VOD: a key that is not found is then empty.
    """
    table = draft.data.get("credentials", {})
    if not isinstance(table, dict):
        validation.table("credentials", CredentialsTable)
        return None
    found = {key: value for key, value in table.items() if value is not None}  # data of `from_dict` may contain None
    provider = found.get("provider", "static")
    if provider not in ("static", *KEYS_OF_ROLES):
        validation.validated(CredentialsTable, found, ("credentials",))
        return None
    _refuse_keys_of_others(draft, provider, found)
    if provider == "assume_role":
        found = {**_from_environment(draft.env), **found}
        if needs_key and "role_arn" not in found:
            draft.problems.add(
                ("credentials", "role_arn"),
                "is missing (for example qcs::cam::uin/100000000001:roleName/vodpoller; or set the variable"
                " TENCENTCLOUD_ROLE_ARN)",
            )
    if provider != "cvm_role":
        return _with_key(draft, validation, found, provider, needs_key=needs_key)
    valid = validation.validated(CredentialsTable, found, ("credentials",))
    return FoundCredentials(key=_no_key(), role=_role_of(valid)) if valid else None


def _refuse_keys_of_others(draft: Draft, provider: str, table: Mapping[str, Any]) -> None:
    owners: dict[str, tuple[str, ...]] = {key: (name,) for name, keys in KEYS_OF_ROLES.items() for key in keys}
    owners |= dict.fromkeys(KEYS_OF_A_GIVEN_KEY, ("static", "assume_role"))
    for key in table:
        if provider not in owners.get(key, (provider,)):
            whose = " or ".join(quoted(name) for name in owners[key])
            draft.problems.add(
                ("credentials", key),
                f"belongs to provider = {whose}, but provider is {quoted(provider)} (delete this key, or correct"
                " provider)",
            )


def _from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """The values that tccli also takes from the environment."""
    names = {"role_arn": "TENCENTCLOUD_ROLE_ARN", "role_session_name": "TENCENTCLOUD_ROLE_SESSION_NAME"}
    return {key: value for key, name in names.items() if (value := env.get(name))}


def _no_key() -> StaticCredentials:
    return StaticCredentials(secret_id=Secret(value=""), secret_key=Secret(value=""), token=None)


def _role_of(valid: CredentialsTable) -> Role | None:
    match valid.provider:
        case "static":
            return None
        case "cvm_role":
            return CvmRole(role=valid.role or "", metadata_endpoint=valid.metadata_endpoint)
        case "assume_role":
            return AssumedRole(
                role_arn=valid.role_arn or "",
                role_session_name=valid.role_session_name,
                duration_secs=valid.duration_secs,
                external_id=valid.external_id or "",
                sts_endpoint=valid.sts_endpoint,
                sts_region=valid.sts_region,
            )


def _with_key(
    draft: Draft, validation: Validation, found: dict[str, Any], provider: str, *, needs_key: bool
) -> FoundCredentials | None:
    """The credentials, for a provider that needs a given API key.

    Args:
        draft: As for `find_credentials`.
        validation: As for `find_credentials`.
        found: The table; secrets that it lacks are added to it.
        provider: "static" or "assume_role".
        needs_key: As for `find_credentials`.
    """
    given = dict(found)
    places = {key: _find_credential(draft, key, found) for key in ("secret_id", "secret_key")}
    # A token belongs to one key: a token found in another place would make a permanent key invalid.
    token_place = _find_credential(draft, "token", found, only=places["secret_key"])
    is_missing = None in places.values() or (provider == "assume_role" and "role_arn" not in found)
    if is_missing and not needs_key:
        return FoundCredentials(key=_no_key())  # without a role: the key to assume it, or its name, is missing
    for key, place in places.items():
        if place is None:
            draft.problems.add(
                ("credentials", key),
                f"was not found (set {key}_file in [credentials], or provide $CREDENTIALS_DIRECTORY/{key}"
                f" as systemd's LoadCredential= does, or set the variable TENCENTCLOUD_{key.upper()})",
            )
    valid = validation.validated(CredentialsTable, found, ("credentials",))
    for key, secret in valid.named_secrets() if valid else ():
        _check_key(draft, key, secret, from_environment=key in found and key not in given)
    if valid is None or valid.secret_id is None or valid.secret_key is None:
        return None
    origins = {
        key: _origin(draft.context, key, place, given)
        for key, place in {**places, "token": token_place}.items()
        if place
    }
    found_key = StaticCredentials(
        secret_id=valid.secret_id, secret_key=valid.secret_key, token=valid.token, origins=origins
    )
    with suppress(OSError, UnicodeDecodeError):  # each file could be read a moment ago
        found_key.reread()  # the files were read one by one, and may have been replaced in between
    return FoundCredentials(key=found_key, role=_role_of(valid))


def _find_credential(draft: Draft, key: str, table: dict[str, Any], *, only: str | None = None) -> str | None:
    """Add one secret to the table if the table lacks it. Returns its place: "file", "directory", "env", or None."""
    if key in table or f"{key}_file" in table:
        return "file"
    directory = draft.context.credentials_directory
    if only in (None, "directory") and directory is not None and _seems_to_exist(directory / key):
        table[f"{key}_file"] = str(directory / key)
        return "directory"
    if only in (None, "env") and (value := draft.env.get(f"TENCENTCLOUD_{key.upper()}")):
        table[key] = value
        return "env"
    return None


def _origin(context: ConfigContext, key: str, place: str, given: Mapping[str, Any]) -> str:
    """The place of a secret of the API key, in words for a person."""
    match place:
        case "directory":
            return f"$CREDENTIALS_DIRECTORY/{key} ({context.locate(key)})"
        case "env":
            return f"$TENCENTCLOUD_{key.upper()}"
        case _ if isinstance(name := given.get(f"{key}_file"), str):
            return str(context.locate(name))
        case _:
            return "the configuration"


def _check_key(draft: Draft, key: str, secret: Secret, *, from_environment: bool) -> None:
    if problem := secret.restrict(problem_in_key):
        variable = f"$TENCENTCLOUD_{key.upper()} " if from_environment else ""
        draft.problems.add(
            ("credentials", f"{key}_file" if secret.path else key),
            f"{f'{secret.path} ' if secret.path else variable}{problem} (write only the key itself)",
        )


def key_renewal(credentials: StaticCredentials, context: ConfigContext) -> str:
    """What an operator does to make the daemon use a new key, in words for a person.

    SIGHUP is enough if the key is in files that can change. systemd copies the files of LoadCredential= when the
    service starts, and never again (systemd.exec(5)).

    Args:
        credentials: The API key, as it was found.
        context: Gives the folder of systemd's copies.
    """
    directory = context.credentials_directory
    paths = [credentials.secret_id.path, credentials.secret_key.path]
    if credentials.token is not None:
        paths.append(credentials.token.path)
    if directory is not None and any(path and path.is_relative_to(directory.absolute()) for path in paths):
        return "restart the service (systemd copies the files of LoadCredential= only at its start)"
    return "send SIGHUP" if all(paths) else "restart the daemon"


def _seems_to_exist(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return True  # reading it will report the problem
