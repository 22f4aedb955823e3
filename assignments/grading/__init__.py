"""Grading of the assignments: the learner's code in a sandbox, the tests outside of it."""
