"""Monitors of representation collapse and of instance discrimination."""
