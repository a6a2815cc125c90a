"""Evaluation: every method generates images for the same samples from the same noise; they are scored."""
