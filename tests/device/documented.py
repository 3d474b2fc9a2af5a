"""Where the device may be read, or waited for: the whole list. By place: how often in the fit of a test, and why."""

import math

LIGHTNING = {
    "trainer/trainer.py:_teardown": (math.inf, "after the fit the module and what was logged come back to the host"),
    "utilities/data.py:has_len_all_ranks": (math.inf, "before the first step the ranks compare their number of batches"),
}
METHODS = {
    "methods/npid.py:training_step": (4, "the first batch of an epoch: an index beyond the memory bank is an error"),
}
CALLBACKS: dict[str, dict[str, tuple[float, str]]] = {}
