"""Readers of the folders of runs and evaluations; they return typed records."""
