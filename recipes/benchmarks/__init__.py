"""What scoring, merging and selecting cost, measured."""
