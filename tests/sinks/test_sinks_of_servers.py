"""The sinks `postgresql` and `mysql` at servers of their own, which are killed, frozen and restarted."""

import pytest

from tests.sinks.sql_harnesses import MysqlHarness, PostgresqlHarness
from vodpoller.testing import sink_conformance

pytestmark = [pytest.mark.servers, pytest.mark.system]

TestPostgresql = sink_conformance(PostgresqlHarness)
TestMysql = sink_conformance(MysqlHarness)
