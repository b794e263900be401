"""Training on trl's trainers: atomic checkpoints without pickles, exact resume, and checks that raise errors."""
