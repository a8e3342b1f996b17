"""Studies of what the noise is and what it does, each with its records and pictures in ``results``."""
