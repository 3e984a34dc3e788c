-- An evaluation is a job of another kind: it has a job's states, events and attempts.
ALTER TABLE jobs ADD COLUMN kind TEXT NOT NULL DEFAULT 'fine_tuning' CHECK (kind IN ('fine_tuning', 'evaluation'));
CREATE INDEX jobs_by_kind ON jobs (kind, sequence);

-- A model on a task at a number of shots. tokens: what the requests would take one by one; tokens_run: what went through the model.
CREATE TABLE evaluation_units (
    sequence     INTEGER PRIMARY KEY AUTOINCREMENT,
    evaluation   TEXT NOT NULL REFERENCES jobs (id),
    model        TEXT NOT NULL CHECK (model <> ''),
    precision    TEXT NOT NULL CHECK (precision <> ''),
    task         TEXT NOT NULL CHECK (task <> ''),
    num_fewshot  INTEGER NOT NULL CHECK (num_fewshot >= 0),
    parent       TEXT NOT NULL, -- its definition's task
    subgroup     TEXT NOT NULL, -- the subtask's, '' where there is none
    metrics      TEXT NOT NULL,
    pool         TEXT NOT NULL, -- the file that examples came from, '' at 0 shots
    tokens       INTEGER NOT NULL,
    tokens_run   INTEGER NOT NULL,
    seconds      REAL NOT NULL,
    UNIQUE (evaluation, model, precision, task, num_fewshot)
);

-- One scored example; detail is what clients download.
CREATE TABLE evaluation_results (
    sequence        INTEGER PRIMARY KEY AUTOINCREMENT,
    unit            INTEGER NOT NULL REFERENCES evaluation_units (sequence),
    document        INTEGER NOT NULL CHECK (document >= 0),
    acc             INTEGER NOT NULL CHECK (acc IN (0, 1)),
    acc_norm        INTEGER NOT NULL CHECK (acc_norm IN (0, 1)),
    log_likelihood  REAL, -- NULL = NaN
    detail          TEXT NOT NULL CHECK (json_type(detail) = 'object'),
    UNIQUE (unit, document)
);
