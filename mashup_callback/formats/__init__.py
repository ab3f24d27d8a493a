"""Files that strangers wrote, read safely."""
