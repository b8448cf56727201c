"""Where things came from and what became of them: between raw records, samples, steps, checkpoints and scores."""
