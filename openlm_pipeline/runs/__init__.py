"""Run folders: their identity, checkpoints, metrics and outcome, and the launcher that fills them."""
