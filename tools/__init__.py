"""Programs for the GPU kernels' developers, run as ``python -m tools.NAME`` from the root."""
