"""Monitor of the invariances that features acquire."""
