"""The live model, whatever wraps it."""
