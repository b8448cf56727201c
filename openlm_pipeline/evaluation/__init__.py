"""Evaluation of checkpoints: suites of tasks, prompts, the scorer, per-item results, statistics and scorecards.

`suite` reads which tasks there are, `tasks` turns their rows into token ids, `scorer` runs the model, `items` is the
per-item table that everything else derives from, `statistics` has the intervals and tests, `scorecard` sums up.
"""
