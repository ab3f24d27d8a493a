"""A small world for a first run: offline, on a CPU, in about a minute."""
