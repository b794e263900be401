"""What a model can do, in figures: tasks, metrics and their records."""
