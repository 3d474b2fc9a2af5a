"""Where the device may be read, or waited for: the whole list. By place: how often in the fit of a test, and why."""

import math

LIGHTNING = {
    "trainer/trainer.py:_teardown": (math.inf, "after the fit the module and what was logged come back to the host"),
    "utilities/data.py:has_len_all_ranks": (
        math.inf,
        "before the first step the ranks compare their number of batches",
    ),
}
METHODS = {
    "callbacks/queue_update.py:on_train_batch_end": (4, "NPID, the first batch of an epoch: as in `training_step`"),
    "methods/npid.py:training_step": (4, "the first batch of an epoch: an index beyond the memory bank is an error"),
}
METRICS = {
    "metrics/knn.py:update_bank": (math.inf, "argument check: labels lie in 0..num_classes - 1"),
    "metrics/knn.py:update": (math.inf, "argument check: labels lie in 0..num_classes - 1"),
    "metrics/neighbours.py:knn_scores": (math.inf, "argument check: labels lie in 0..num_classes - 1"),
    "metrics/lda_rank.py:update": (math.inf, "argument check: each image has two views; how many images there are"),
}
CALLBACKS: dict[str, dict[str, tuple[float, str]]] = {
    "ViewAugmentation": {},
}
