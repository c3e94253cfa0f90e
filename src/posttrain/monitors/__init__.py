"""Watchers over a run's own records. They read and warn; they never change what they watch."""
