"""Checks for the exercises: right or not yet, without giving the answer away."""
