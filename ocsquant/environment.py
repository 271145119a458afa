"""What runs here, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from ocsquant.ops import cpu_isa


@dataclass(frozen=True)
class Environment:
    """Versions, the kernels' instruction-set level and the reason for it, and the thread count."""

    ocsquant: str
    torch: str
    python: str
    machine: str
    isa: str
    isa_reason: str
    threads: int
    requested_isa: str | None

    def __str__(self) -> str:
        asked = f", OCSQUANT_ISA={self.requested_isa}" if self.requested_isa else ""
        return (
            f"ocsquant {self.ocsquant}, torch {self.torch}, Python {self.python}, {self.machine}, "
            f"{self.threads} threads\n"
            f"CPU kernels: {self.isa} ({self.isa_reason}{asked})"
        )


def env() -> Environment:
    """The environment; `print(ocsquant.env())` is what a bug report needs."""
    try:
        own = version("ocsquant")
    except PackageNotFoundError:
        own = "in its source tree"
    isa, reason = cpu_isa()
    return Environment(
        own,
        torch.__version__,
        platform.python_version(),
        platform.machine(),
        isa,
        reason,
        torch.get_num_threads(),
        os.environ.get("OCSQUANT_ISA"),
    )
