"""What the benchmarks ran on."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """Such as "AMD EPYC 9B14" or "Intel(R) Xeon(R) Processor"."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
