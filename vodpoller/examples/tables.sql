-- The tables of the sinks `postgresql`, `mysql` and `sqlite`. Use the part for your database.
--
-- `vodpoller_events` is for a sink without `statement`: one row for each event. Columns of your own may be added, if they
-- have a default or may be null. The body's type must not change the body: not jsonb, not MySQL's JSON.
-- `vodpoller_inbox` is for a sink with `statement`: it remembers the events for which the statement was run. It must be
-- in the same database as the tables that the statement changes. The sink deletes old rows of it.

-- [postgresql] ---------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS vodpoller_events (
    key         char(64)    PRIMARY KEY,
    source      text        NOT NULL,
    event_type  text        NOT NULL,
    file_id     text,
    task_id     text,
    received_at timestamptz NOT NULL,
    body        json        NOT NULL
);

CREATE TABLE IF NOT EXISTS vodpoller_inbox (
    key         char(64)    NOT NULL,
    sink        text        NOT NULL,
    accepted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (key, sink)
);

CREATE INDEX IF NOT EXISTS vodpoller_inbox_accepted_at ON vodpoller_inbox (sink, accepted_at);

-- The rights that the sink's user needs:
-- GRANT SELECT, INSERT ON vodpoller_events TO vodpoller;
-- GRANT SELECT, INSERT, DELETE ON vodpoller_inbox TO vodpoller;

-- [mysql] MySQL from 8.0, MariaDB from 10.5 ----------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS vodpoller_events (
    `key`       CHAR(64) CHARACTER SET ascii COLLATE ascii_bin PRIMARY KEY,
    source      VARCHAR(255) NOT NULL,
    event_type  VARCHAR(255) NOT NULL,
    file_id     VARCHAR(255),
    task_id     VARCHAR(255),
    received_at DATETIME(6)  NOT NULL,
    body        LONGTEXT     NOT NULL
) ENGINE = InnoDB CHARACTER SET utf8mb4;

CREATE TABLE IF NOT EXISTS vodpoller_inbox (
    `key`       CHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    sink        VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    accepted_at DATETIME(6)  NOT NULL DEFAULT CURRENT_TIMESTAMP(6),
    PRIMARY KEY (`key`, sink),
    INDEX vodpoller_inbox_accepted_at (sink, accepted_at)
) ENGINE = InnoDB;

-- The rights that the sink's user needs:
-- GRANT SELECT, INSERT ON app.vodpoller_events TO vodpoller;
-- GRANT SELECT, INSERT, DELETE ON app.vodpoller_inbox TO vodpoller;

-- [sqlite] -------------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS vodpoller_events (
    key         TEXT PRIMARY KEY NOT NULL,
    source      TEXT NOT NULL,
    event_type  TEXT NOT NULL,
    file_id     TEXT,
    task_id     TEXT,
    received_at TEXT NOT NULL,
    body        TEXT NOT NULL
);

CREATE TABLE IF NOT EXISTS vodpoller_inbox (
    key         TEXT NOT NULL,
    sink        TEXT NOT NULL,
    accepted_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    PRIMARY KEY (key, sink)
);

CREATE INDEX IF NOT EXISTS vodpoller_inbox_accepted_at ON vodpoller_inbox (sink, accepted_at);
