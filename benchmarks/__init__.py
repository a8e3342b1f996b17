"""Speed: programs that time the package and what it is compared with, run as ``python -m benchmarks.NAME`` from the root.

Records and pictures are in ``results``. ``records`` and ``sections`` serve ``experiments`` too.
"""
