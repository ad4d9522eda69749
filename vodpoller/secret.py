"""Secrets: read from the configuration or from a file, read again on SIGHUP, never shown."""

import errno
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

FORMER_MAX: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigContext:
    """What the meaning of the configuration depends on, besides its text; pydantic's validation context.

    Args:
        base: The folder of the configuration file; relative names of secret files refer to it.
        credentials_directory: `$CREDENTIALS_DIRECTORY` of systemd.exec(5); if it is set, they refer to it instead.
    """

    base: Path = Path()
    credentials_directory: Path | None = None

    def locate(self, name: str) -> Path:
        """The path of a secret file.

        Args:
            name: As configured, relative or absolute.
        """
        return ((self.credentials_directory or self.base) / name).absolute()


class Secret:
    """One secret value.

    Args:
        value: The secret itself; None if it is in a file.
        path: The file that holds it. Line ends around it are not part of it.
        is_first_line: The secret is only the file's first line.

    Raises:
        OSError: The file cannot be read, or is empty.
        UnicodeDecodeError: The file is not UTF-8.
    """

    def __init__(self, *, value: str | None = None, path: Path | None = None, is_first_line: bool = False) -> None:
        self._value = (value or "").strip("\r\n")
        self._path = path
        self._is_first_line = is_first_line
        self._problem_in: Callable[[str], str] = lambda _value: ""
        self._former: deque[str] = deque(maxlen=FORMER_MAX)
        self._value = self.read()

    @property
    def path(self) -> Path | None:
        """The file that holds it; None if its value was given."""
        return self._path

    def get(self) -> str:
        """The value as of the last read."""
        return self._value

    def known(self) -> tuple[str, ...]:
        """The value and the last values before it: a request that is under way may still use one of those."""
        return (self._value, *self._former)

    def reread(self) -> None:
        """Read the file again, if there is one. If that fails, the last value stays.

        Raises:
            OSError: As `read`.
            UnicodeDecodeError: As `read`.
        """
        self.take(self.read())

    def read(self) -> str:
        """The secret in the file now, or the value if it is not from a file. This does not change the value.

        Raises:
            OSError: The file cannot be read, is empty, or holds a value that `restrict` refuses.
            UnicodeDecodeError: The file is not UTF-8.
        """
        if self._path is None:
            return self._value
        value = self._path.read_text(encoding="utf-8").strip("\r\n")
        if self._is_first_line:
            value = value.partition("\n")[0].rstrip("\r")
        if not value:
            raise OSError(errno.ENODATA, "it is empty", str(self._path))
        if problem := self._problem_in(value):
            raise OSError(errno.EINVAL, problem, str(self._path))
        return value

    def take(self, value: str) -> None:
        """Use another value from now on.

        Args:
            value: What `read` returned.
        """
        if value != self._value:
            self._former.appendleft(self._value)
            self._value = value

    def restrict(self, problem_in: Callable[[str], str]) -> str:
        """Refuse wrong values when the file is read later.

        Args:
            problem_in: Returns what is wrong with a value, without quoting it; empty if nothing is wrong.

        Returns:
            What is wrong with the present value.
        """
        self._problem_in = problem_in
        return problem_in(self._value)

    def __eq__(self, other: object) -> bool:
        """Whether both are in the same file, also if their values differ; without a file, whether both are equal."""
        return isinstance(other, Secret) and self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Path | None, str]:
        return (self._path, "" if self._path else self._value)

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            _validated_secret,
            serialization=core_schema.plain_serializer_function_ser_schema(_serialized_secret, info_arg=True),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "minLength": 1, "format": "password", "writeOnly": True}


@dataclass(frozen=True, slots=True)
class _InFile:
    """Placeholder in the field of a secret that is in a file, until the secret itself is validated."""

    key: str
    name: str
    both: bool


class HasSecrets(BaseModel):
    """A model whose secrets may be in files: declare `X: Secret | None = None` and `X_file: str | None = None`.

    X is filled from the file that X_file names; giving both, or a file without content, is an error. The validation
    context, a `ConfigContext`, says to which folder relative names refer. X is never shown, also if it is wrong.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _read_files(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        files = {}
        for key in cls.secret_keys():
            name = data.get(f"{key}_file")
            if isinstance(name, str):
                files[key] = _InFile(f"{key}_file", name, both=data.get(key) is not None)
        return {**data, **files}

    @classmethod
    def secret_file_keys(cls) -> Iterator[str]:
        """The fields that name files with secrets."""
        return (f"{key}_file" for key in cls.secret_keys())

    @classmethod
    def secret_keys(cls) -> Iterator[str]:
        """The fields that hold secrets and have a `_file` twin."""
        for key, field in cls.model_fields.items():
            if (field.annotation is Secret or Secret in get_args(field.annotation)) and (
                f"{key}_file" in cls.model_fields
            ):
                yield key

    def secrets(self) -> Iterator[Secret]:
        """All secrets that are given."""
        for _, secret in self.named_secrets():
            yield secret

    def named_secrets(self) -> Iterator[tuple[str, Secret]]:
        """The same, each with its key."""
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, Secret):
                yield key, value


def _validated_secret(value: Any, info: ValidationInfo) -> Secret:
    match value:
        case Secret():
            return value
        case _InFile(both=True):
            only = value.key.removesuffix("_file")
            raise _problem(value.key, f"is given together with {only} (keep one of the two)")
        case _InFile():
            return _secret_from_file(
                value, info.context if isinstance(info.context, ConfigContext) else ConfigContext()
            )
        case str() if value.strip("\r\n"):
            return Secret(value=value)
        case str():
            raise _problem("", "is empty (if no secret is needed, leave the key out)")
        case _:
            raise _problem("", "must be text in quotes")


def _secret_of_name(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return value
    context = info.context if isinstance(info.context, ConfigContext) else ConfigContext()
    given = _InFile(info.field_name or "", value, both=False)
    return _secret_from_file(given, context, is_first_line=True)


SecretFile = Annotated[Secret, BeforeValidator(_secret_of_name)]
"""A secret in a file: the configuration has only the file's name; the secret is the file's first line."""


def _secret_from_file(given: _InFile, context: ConfigContext, *, is_first_line: bool = False) -> Secret:
    if not given.name:
        raise _problem(given.key, "is empty (give the name of the file that holds the secret)")
    path = context.locate(given.name)
    try:
        return Secret(path=path, is_first_line=is_first_line)
    except OSError as error:
        why = error.strerror or type(error).__name__
    except UnicodeDecodeError:  # its own message would show bytes of the secret
        why = "it is not UTF-8 text"
    except ValueError:
        why = "a file cannot have such a name"
    raise _problem(given.key, f"{path} cannot be read: {why} (put the secret into that file, readable for this user)")


def _problem(key: str, why: str) -> PydanticCustomError:
    """An error about the key that was written in the configuration; an empty key means the field's own."""
    return PydanticCustomError("vodpoller", "{why}", {"why": why, "key": key})


def _serialized_secret(value: Secret, info: SerializationInfo) -> Any:
    return "***" if info.mode_is_json() else value
