"""The report and the merge for others."""
