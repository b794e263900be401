"""Compare methods on one model and one data set: runs, statistics, one recommendation."""
