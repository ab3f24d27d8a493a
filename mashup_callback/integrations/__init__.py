"""Plugins for trainers that are set up by a configuration file; each module is imported by its trainer alone."""
