"""Evaluation: images of test scenes by every method from the same noise, and what they show."""
