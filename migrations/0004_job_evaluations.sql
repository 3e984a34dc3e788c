-- A fine-tuning job may name evaluations of what it makes. evaluations: what it named, on its row; parent: the job, on theirs.
ALTER TABLE jobs ADD COLUMN evaluations TEXT CHECK (evaluations IS NULL OR json_type(evaluations) = 'object');
ALTER TABLE jobs ADD COLUMN parent TEXT NOT NULL DEFAULT '';
CREATE INDEX jobs_by_parent ON jobs (parent, sequence) WHERE parent <> '';
