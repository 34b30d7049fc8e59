"""Readers for the few formats that a run file cannot describe."""
