"""Checks for any LightningModule, callback or loss: resume, kills, world size, transparency, host reads, launches.

Each says in words what differs and where it first differs. Use small modules: every kit trains, and keeps copies.
"""

from typing import TYPE_CHECKING

from lightning_contrast._lazy import attach

if TYPE_CHECKING:
    from lightning_contrast.testing.faults import Kill as Kill
    from lightning_contrast.testing.faults import assert_survives_kills as assert_survives_kills
    from lightning_contrast.testing.host_syncs import HostSyncs as HostSyncs
    from lightning_contrast.testing.host_syncs import count_host_syncs as count_host_syncs
    from lightning_contrast.testing.kernels import count_kernels as count_kernels
    from lightning_contrast.testing.processes import ChildError as ChildError
    from lightning_contrast.testing.processes import free_port as free_port
    from lightning_contrast.testing.processes import run_processes as run_processes
    from lightning_contrast.testing.resume import assert_resume_exact as assert_resume_exact
    from lightning_contrast.testing.transparency import (
        assert_callback_changes_nothing as assert_callback_changes_nothing,
    )
    from lightning_contrast.testing.world_size import check_world_size_equivalence as check_world_size_equivalence

__getattr__, __dir__, __all__ = attach(__name__, __file__)
