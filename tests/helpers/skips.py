"""What a machine may lack without anything being wrong with it: the reasons for which tests may be skipped."""

from neft_kernels import available_backends
from neft_kernels.ops.native import NOT_BUILT

NO_GPU = "no GPU on this machine"
NO_INDEX = "no package index can be reached"
_cpu = {backend.name: backend.detail for backend in available_backends()}["cpu"]
NO_CPU_EXTENSION = _cpu if _cpu.startswith(NOT_BUILT) else None
EXPECTED_SKIPS = [reason for reason in (NO_GPU, NO_INDEX, NO_CPU_EXTENSION) if reason]
