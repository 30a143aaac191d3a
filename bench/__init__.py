"""Measurements: what each op costs beside what it must cost (timing.py), and one command for a GPU machine."""
