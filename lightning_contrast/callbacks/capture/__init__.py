"""Capture of features, labels and batches that callbacks share."""
