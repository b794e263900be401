"""Evaluation of models: tasks, metrics and their records."""
