"""The loss of each candidate on a sample."""
