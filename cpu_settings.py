"""Settings of the C libraries under PyTorch that make training on a CPU faster. Import before torch.

- OpenMP's threads spin for a while after each parallel region, on the cores that the scan's own threads
  need. PASSIVE puts them to sleep.
- glibc gives every large tensor's memory back to Linux, which fills it with zeros for the next one. Kept,
  it is used again as it is.

What the user has set in the environment stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

if sys.platform == "linux":
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_MMAP_THRESHOLD, 2**30)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
