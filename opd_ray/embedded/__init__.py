"""The small models and data that the package makes itself."""
