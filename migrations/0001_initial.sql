-- What a daemon remembers. Append-only: an applied migration's text is never edited, a change is a new file.
--
-- `sequence` is the order of creation, which lists page through; times are seconds since 1970, 0 = not yet or
-- never; '' stands where a client reads null. A job names its files by id without a foreign key: a job that has
-- ended keeps the names of files that were deleted since.

CREATE TABLE files (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT NOT NULL UNIQUE CHECK (id <> ''),
    bytes           INTEGER NOT NULL CHECK (bytes >= 0),
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER NOT NULL CHECK (expires_at >= 0),
    filename        TEXT NOT NULL,
    purpose         TEXT NOT NULL CHECK (purpose <> ''),
    status          TEXT NOT NULL CHECK (status IN ('uploaded', 'processed', 'error')),
    status_details  TEXT NOT NULL,
    sha256          TEXT NOT NULL
);
CREATE INDEX files_by_purpose ON files (purpose, sequence);
CREATE INDEX files_by_expiry ON files (expires_at) WHERE expires_at > 0;

CREATE TABLE jobs (
    sequence          INTEGER PRIMARY KEY AUTOINCREMENT,
    id                TEXT NOT NULL UNIQUE CHECK (id <> ''),
    created_at        INTEGER NOT NULL,
    started_at        INTEGER NOT NULL,
    finished_at       INTEGER NOT NULL,
    model             TEXT NOT NULL CHECK (model <> ''),
    fine_tuned_model  TEXT NOT NULL,
    suffix            TEXT NOT NULL,
    status            TEXT NOT NULL CHECK (status IN ('validating_files', 'queued', 'running', 'paused',
                                                      'succeeded', 'failed', 'cancelled')),
    training_file     TEXT NOT NULL,
    validation_file   TEXT NOT NULL,
    result_file       TEXT NOT NULL,
    seed              INTEGER NOT NULL, -- the bits of a uint64
    hyperparameters   TEXT NOT NULL CHECK (json_type(hyperparameters) = 'object'),
    metadata          TEXT CHECK (metadata IS NULL OR json_type(metadata) = 'object'),
    trained_tokens    INTEGER NOT NULL CHECK (trained_tokens >= -1),
    error_code        TEXT NOT NULL,
    error_param       TEXT NOT NULL,
    error_message     TEXT NOT NULL,
    attempt           INTEGER NOT NULL CHECK (attempt >= 0),
    step              INTEGER NOT NULL CHECK (step >= 0),
    total_steps       INTEGER NOT NULL CHECK (total_steps >= 0),
    tokens_per_second REAL, -- NULL = NaN, here and below
    loss              REAL,
    eta_seconds       REAL,
    peak_memory_bytes INTEGER NOT NULL,
    bytes_per_token   REAL,
    device            TEXT NOT NULL
);
-- Few jobs are open at a time: every question about open ones goes through this.
CREATE INDEX jobs_by_status ON jobs (status);

CREATE TABLE events (
    sequence    INTEGER PRIMARY KEY AUTOINCREMENT,
    job         TEXT NOT NULL REFERENCES jobs (id),
    created_at  INTEGER NOT NULL,
    level       TEXT NOT NULL CHECK (level IN ('info', 'warn', 'error')),
    type        TEXT NOT NULL CHECK (type IN ('message', 'metrics')),
    message     TEXT NOT NULL,
    data        TEXT CHECK (data IS NULL OR json_valid(data)),
    step        INTEGER CHECK (type <> 'metrics' OR step >= 0)
);
CREATE INDEX events_by_job ON events (job, sequence);
CREATE UNIQUE INDEX events_metrics ON events (job, step) WHERE type = 'metrics';

-- Adapters and fine-tuned models; base models are folders and have no row.
CREATE TABLE models (
    sequence  INTEGER PRIMARY KEY AUTOINCREMENT,
    id        TEXT NOT NULL UNIQUE CHECK (id <> ''),
    created   INTEGER NOT NULL,
    owned_by  TEXT NOT NULL,
    root      TEXT NOT NULL,
    parent    TEXT NOT NULL,
    path      TEXT NOT NULL CHECK (path <> ''),
    job       TEXT REFERENCES jobs (id), -- NULL: made by no job
    step      INTEGER NOT NULL CHECK (step >= -1), -- a checkpoint's; -1 otherwise
    is_full   INTEGER NOT NULL CHECK (is_full IN (0, 1))
);
CREATE INDEX models_by_job ON models (job);

CREATE TABLE checkpoints (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT NOT NULL UNIQUE CHECK (id <> ''),
    job             TEXT NOT NULL REFERENCES jobs (id),
    created_at      INTEGER NOT NULL,
    step            INTEGER NOT NULL CHECK (step >= 0),
    model           TEXT NOT NULL UNIQUE REFERENCES models (id) ON DELETE CASCADE,
    train_loss      REAL,
    train_accuracy  REAL,
    valid_loss      REAL,
    valid_accuracy  REAL,
    UNIQUE (job, step)
);
CREATE INDEX checkpoints_by_job ON checkpoints (job, sequence);

-- Where a paused or interrupted job goes on from, when that is no listed checkpoint.
CREATE TABLE resume_points (
    job   TEXT PRIMARY KEY REFERENCES jobs (id),
    step  INTEGER NOT NULL CHECK (step >= 0),
    path  TEXT NOT NULL CHECK (path <> '')
) WITHOUT ROWID;

-- Answers to POSTs that carried an Idempotency-Key.
CREATE TABLE answers (
    scope       TEXT NOT NULL,
    key         TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    body_hash   TEXT NOT NULL,
    status      INTEGER NOT NULL,
    body        TEXT NOT NULL,
    PRIMARY KEY (scope, key)
) WITHOUT ROWID;
CREATE INDEX answers_by_age ON answers (created_at);

CREATE TABLE keys (
    sequence      INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE CHECK (id <> ''),
    name          TEXT NOT NULL CHECK (name <> ''),
    hash          TEXT NOT NULL UNIQUE CHECK (length(hash) = 64),
    created_at    INTEGER NOT NULL,
    revoked_at    INTEGER NOT NULL,
    last_used_at  INTEGER NOT NULL
);
CREATE UNIQUE INDEX keys_live_name ON keys (name) WHERE revoked_at = 0;
