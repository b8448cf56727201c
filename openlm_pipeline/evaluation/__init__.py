"""Evaluation of models: suites of tasks, prompts, the scorer, per-item results, statistics and scorecards.

`suite` and `suite_files` read which tasks there are, `task_files` their rows, `tasks` turns rows into token ids, and
`prepare` does both for a suite. `scorer` runs a `model` (`huggingface` adapts others'), `generation` writes texts and
`answers` judges them; `foundry` is LLM Foundry in its own environment. `results` keeps the per-item table of `items`,
from which all else derives: `scores`, `averages`, `comparison` with `statistics`, and the `scorecard`. `baselines` has
published scores and those of guessing; `subject` opens what is scored.
"""
