-- Sums over an evaluation's examples, which clients poll for, without the pages that the examples' details are on.
CREATE INDEX evaluation_results_sums ON evaluation_results (unit, document, acc, acc_norm, log_likelihood);
