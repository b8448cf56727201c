"""Run folders: their identity, metrics and outcome, the launchers that fill them, and what training takes."""
