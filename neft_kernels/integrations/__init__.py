"""Training frameworks. Each module imports its framework, so none is imported by the package itself."""
