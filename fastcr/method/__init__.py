"""Encoders, the branch, the step: what a run trains."""
