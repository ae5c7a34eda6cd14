"""``opd-ray doctor``: is the cluster fit for a run of this configuration?"""

from __future__ import annotations

from pathlib import Path

from opd_ray.config import Config
from opd_ray.doctor.checks import Doctor
from opd_ray.placement.session import cluster


def doctor(config: Config, run_dir: Path) -> bool:
    """Prints a line for each check as it comes; False where any found something to do. On the cluster that RAY_ADDRESS
    names, or a Ray of its own."""
    well = True
    with cluster():
        for finding in Doctor(config, run_dir.absolute()).findings():
            print(finding, flush=True)
            well = well and finding.ok
    return well
