"""Embeddings of a data set, and what they are worth."""
