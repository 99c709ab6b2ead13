"""Judges of a rollout's final answer: exact, choice, math and code.

Each is a module with the two functions of `common.Verifier`. They run in worker processes (worker.py) that are killed
when they take too long (workers.py). A question is the row of the data file as it is.
"""
