"""The configuration keys that all sinks for databases have."""

import re
from collections.abc import Iterator
from importlib import import_module
from math import ceil
from typing import Annotated, ClassVar, Final, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from vodpoller.secret import Secret
from vodpoller.sinks.contract import SinkConfig

VALUE_NAMES: Final = ("key", "source", "sub_app_id", "event_type", "file_id", "task_id", "body", "received_at")
"""The names of the values of an event that a statement may use."""

_TABLE: Final = re.compile(r"[^\W\d][\w$]*(\.[^\W\d][\w$]*)?")
_LITERAL_OR_COMMENT: Final = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)
_COLON_NAME: Final = re.compile(r":([^\W\d]\w*)")
_PERCENT_NAME: Final = re.compile(r"%(?:%|\((\w*)\)s)?")
_DAY_SECS: Final = 86_400
_INBOX_RESERVE_DAYS: Final = 7


class SqlConfig(SinkConfig):
    """The settings that are the same for all databases."""

    uses_colons: ClassVar[bool] = False

    table: Annotated[str, Field(max_length=128)] = Field(
        default="vodpoller_events",
        description="The table that gets a row for each event: NAME or SCHEMA.NAME. `vodpoller example sql` prints it.",
    )
    create_table: bool = Field(
        default=False,
        description="Whether the table is created if it does not exist; with `statement`, the table `vodpoller_inbox`.",
    )
    statement: Annotated[str, Field(min_length=1, max_length=65_536)] | None = Field(
        default=None,
        description="A statement of your own that replaces the row in `table`. It is run exactly once for each event,"
        " in one transaction with a row in the table `vodpoller_inbox`. `%(name)s` (for `sqlite`, `:name`) is a value"
        f" of the event: {', '.join(VALUE_NAMES)}.",
    )
    inbox_days: Annotated[int, Field(ge=8, le=3650)] = Field(
        default=30,
        description="Number of days after which a row of the inbox is deleted, by the database's clock; at least 7 days"
        " more than `give_up_after_secs`.",
    )
    timeout_secs: Annotated[float, Field(ge=0.1, le=300)] = Field(
        default=10.0, description="Time limit of a transaction, the connection to the database included."
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(
        default=4, description="Maximum number of connections, each with a transaction of its own."
    )
    batch_max_events: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=64, description="Maximum number of events in one transaction."
    )

    @field_validator("table")
    @classmethod
    def _is_a_table(cls, value: str) -> str:
        if not _TABLE.fullmatch(value):
            raise ValueError("it is not the name of a table (letters, digits and _; NAME or SCHEMA.NAME)")
        return value

    @field_validator("statement")
    @classmethod
    def _can_be_run(cls, value: str | None) -> str | None:
        if value is None:
            return None
        for name in cls._names_in(value):
            if name not in VALUE_NAMES:
                raise ValueError(f"it uses {name!r}, which an event does not have (it has: {', '.join(VALUE_NAMES)})")
        return value

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> Self:
        if self.statement is not None and "table" in self.model_fields_set:
            raise problem("table", "is given together with statement (keep one of the two)")
        return self

    @model_validator(mode="after")
    def _inbox_outlasts_retries(self) -> Self:
        at_least = self.give_up_after_secs / _DAY_SECS + _INBOX_RESERVE_DAYS
        if self.inbox_days < at_least:
            why = (
                f"is {self.inbox_days}, but must be at least {ceil(at_least)} (give_up_after_secs and"
                f" {_INBOX_RESERVE_DAYS} days more): an event that is tried again must still be known"
            )
            raise problem("inbox_days", why)
        return self

    @classmethod
    def _names_in(cls, statement: str) -> Iterator[str]:
        if cls.uses_colons:
            yield from _COLON_NAME.findall(_LITERAL_OR_COMMENT.sub("", statement))
            return
        for found in _PERCENT_NAME.finditer(statement):
            if found[0] == "%":
                raise ValueError(
                    "it holds a % that does not begin a value such as %(key)s (write %% for a percent sign)"
                )
            if found[1] is not None:
                yield found[1]


class ServerConfig(SqlConfig):
    """The settings that are the same for all databases that are servers."""

    driver: ClassVar[str]
    extra: ClassVar[str]

    dsn_file: Annotated[str, Field(max_length=4096)] | None = Field(
        default=None, description="The file that holds the DSN.", examples=["events_dsn"]
    )
    dsn: Secret | None = Field(
        default=None, description="The DSN: the address of the database, and the user who logs in."
    )

    @field_validator("type", check_fields=False)
    @classmethod
    def _has_its_driver(cls, value: str) -> str:
        try:
            import_module(cls.driver)
        except ImportError as error:
            raise ValueError(
                f"it needs a Python package that cannot be imported: {error} (pip install 'vodpoller[{cls.extra}]')"
            ) from None
        return value

    @field_validator("dsn")
    @classmethod
    def _can_be_read(cls, value: Secret | None, info: ValidationInfo) -> Secret | None:
        if "type" not in info.data:  # the driver, which parses the DSN, is missing
            return value
        if value is not None and (why := value.restrict(cls.problem_in)):
            raise problem("dsn_file" if info.data.get("dsn_file") else "", why)
        return value

    @model_validator(mode="after")
    def _has_a_dsn(self) -> Self:
        if self.dsn is None:
            raise problem("dsn_file", "is missing (give dsn_file or dsn: the address of the database, and the user)")
        return self

    @classmethod
    def problem_in(cls, dsn: str) -> str:
        """What is wrong with a DSN, without any part of the DSN; empty if it is usable."""
        raise NotImplementedError

    def open_dsn(self) -> str:
        """The DSN, as it was last read from its file."""
        if self.dsn is None:
            raise AssertionError("a configuration without DSN is not valid")
        return self.dsn.get()


def problem(key: str, why: str) -> PydanticCustomError:
    """An error about a key of the table; an empty key stands for the key that is validated."""
    return PydanticCustomError("vodpoller", "{why}", {"why": why, "key": key})
