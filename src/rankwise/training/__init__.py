"""Training: a loop for every objective, atomic checkpoints without pickles, exact resume, checks that raise errors."""
