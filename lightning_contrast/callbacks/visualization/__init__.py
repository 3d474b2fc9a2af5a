"""Callbacks that log views and embeddings as pictures."""
