"""Judges of a rollout's final answer: exact, choice, math and code.

Each has two functions: `check_question(question)`, which raises `UnusableQuestion` where there is nothing to judge by,
and `judge(text, question, settings)`, which never raises for any text. Both run in worker processes that are killed
when they take too long (workers.py). A question is the row of the data file as it is.
"""
