-- What a job's plan says it needs (0 = not planned yet), and the optimizer steps left out because a 16-bit gradient overflowed.
ALTER TABLE jobs ADD COLUMN planned_memory_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN skipped_steps INTEGER NOT NULL DEFAULT 0;
