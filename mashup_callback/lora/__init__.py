"""A LoRA adapter is trained."""
