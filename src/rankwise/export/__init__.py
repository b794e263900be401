"""What leaves the project for others: merged models."""
