from .host_syncs import HostSyncs as HostSyncs
from .host_syncs import count_host_syncs as count_host_syncs
from .processes import ChildError as ChildError
from .processes import free_port as free_port
from .processes import run_processes as run_processes
from .resume import assert_resume_exact as assert_resume_exact
from .transparency import assert_callback_changes_nothing as assert_callback_changes_nothing
from .world_size import check_world_size_equivalence as check_world_size_equivalence
