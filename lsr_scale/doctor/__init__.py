"""Is this machine fit for a run: versions, hardware, which fast paths are on and why others are not, what is known bad.

Every line of the report is a `Finding`. What can be tried in a moment is tried (4- and 8-bit layers, their gradients,
a fused layer, writing to the cache) rather than concluded. Nothing is downloaded.
"""

from collections.abc import Iterator

from lsr_scale.config import RunConfig
from lsr_scale.doctor.environment import check_environment, check_helpers
from lsr_scale.doctor.fast_paths import check_fast_paths
from lsr_scale.doctor.hardware import check_hardware
from lsr_scale.doctor.report import Finding, Report, render
from lsr_scale.doctor.versions import check_versions

__all__ = ["Finding", "Report", "doctor", "render"]


def doctor(run: RunConfig | None = None) -> Report:
    """Look at this machine; takes some seconds, as it imports everything that a run needs.

    Args:
        run: What it is to be fit for: a layer of its model is tried with its adapter. None: layers of a small model.
    """

    def findings() -> Iterator[Finding]:
        yield from check_versions()
        yield from check_hardware()
        yield from check_fast_paths(run)
        yield from check_helpers()
        yield from check_environment()

    return Report(list(findings()))
