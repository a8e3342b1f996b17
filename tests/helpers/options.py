"""Options of the command line that test modules read when they are imported; conftest.py fills them in."""

OPTIONS: dict[str, int] = {}
