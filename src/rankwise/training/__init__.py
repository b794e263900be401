"""Training on trl's SFTTrainer: whole-or-absent checkpoints without pickles, exact resume, checks that fail loudly."""
