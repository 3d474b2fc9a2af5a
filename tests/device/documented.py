"""Where the device may be read, or waited for: the whole list. By place: how often in the fit of a test, and why.

A place allows reads; one that begins with ``meets`` allows a tensor of the host to meet one of the device.
"""

import math

LIGHTNING = {
    "trainer/trainer.py:_teardown": (math.inf, "after the fit the module and what was logged come back to the host"),
    "utilities/data.py:has_len_all_ranks": (
        math.inf,
        "before the first step the ranks compare their number of batches",
    ),
}
METHODS = {
    "MMCR": {
        "losses/redundancy.py:mmcr_loss": (math.inf, "a singular value decomposition checks that it converged"),
    },
    "ExemplarCNN": {
        "methods/exemplar_cnn.py:training_step": (4, "the first batch of an epoch: an index beyond the classes"),
    },
    "Distill": {
        "methods/distill.py:on_train_start": (1, "whether the teacher is that of the checkpoint"),
        "methods/distill.py:training_step": (
            10,
            "the first batch of an epoch: an index beyond the number of samples; each batch: whether all is cached",
        ),
        "callbacks/queue_update.py:on_train_batch_end": (8, "the first batch of an epoch: as in `training_step`"),
    },
    "RoCL": {"runtime/adversarial_pass.py:check_pixels": (4, "the first batch of an epoch: the range of the pixels")},
    "SEED": {"methods/distill.py:on_train_start": (1, "whether the teacher is that of the checkpoint")},
    "NPID": {
        "callbacks/queue_update.py:on_train_batch_end": (4, "the first batch of an epoch: as in `training_step`"),
        "methods/npid.py:training_step": (
            4,
            "the first batch of an epoch: an index beyond the memory bank is an error",
        ),
    },
}
METRICS = {
    "metrics/group_accuracy.py:update": (math.inf, "argument check: groups lie in 0..num_groups - 1"),
    "metrics/knn.py:update_bank": (math.inf, "argument check: labels lie in 0..num_classes - 1"),
    "metrics/knn.py:update": (math.inf, "argument check: labels lie in 0..num_classes - 1"),
    "metrics/neighbours.py:knn_scores": (math.inf, "argument check: labels lie in 0..num_classes - 1"),
    "metrics/lda_rank.py:update": (math.inf, "argument check: each image has two views; how many images there are"),
}
# Counts are those of a fit of two epochs with three batches for training and three for validation.
CALLBACKS = {
    "ViewAugmentation": {
        "callbacks/view_augmentation.py:_transform": (4, "the first batch in training and in validation: the range"),
    },
    "CollapseMonitor": {
        "collapse/monitor.py:on_train_batch_end": (
            12,
            "six in each of two measurements: the figures, and the rows kept",
        ),
    },
    "InstanceDiscriminationMonitor": {
        "collapse/instance_discrimination_monitor.py:on_train_batch_end": (
            2,
            "in each of two measurements: a warning of NaN",
        ),
    },
    "TrainingCostMonitor": {
        "throughput/monitor.py:on_train_epoch_end": (4, "the costs of the ranks, when they are logged"),
        "throughput/monitor.py:on_train_batch_end": (4, "the costs of the ranks, when they are logged"),
        "throughput/monitor.py:on_train_end": (4, "the costs of the ranks, when they are logged"),
    },
    "NonFiniteGuard": {
        "nonfinite_guard.py:on_before_optimizer_step": (6, "one in each of six steps: whether the step may be made"),
    },
    "OnlineLinearProbe": {
        "probes/linear_probe.py:on_train_batch_start": (2, "the first batch: the range of the labels"),
        "probes/linear_probe.py:on_train_batch_end": (3, "the first batch: a warning of NaN, the range of the labels"),
        "probes/linear_head.py:fit": (2400, "two fits of each of two layers: L-BFGS, six in each of 100 iterations"),
        "probes/base.py:on_validation_batch_start": (
            32,
            "twice, of two layers: masks of the bank's valid rows, two for each batch; labels and NaN as in a step",
        ),
        "probes/base.py:on_validation_batch_end": (
            32,
            "a mask of valid rows, two for each layer; once, whether the bank has the features of the step, three each",
        ),
    },
    "OnlineKNN": {
        "probes/knn.py:on_train_batch_start": (2, "the first batch: the range of the labels"),
        "probes/base.py:on_train_batch_end": (1, "the first batch: a warning of NaN"),
        "probes/base.py:on_validation_batch_start": (
            20,
            "twice: masks of the bank's valid rows, two for each batch; labels and NaN as in a step",
        ),
        "probes/base.py:on_validation_batch_end": (
            4,
            "the first batch: a warning of NaN, and whether the bank has the features of the step",
        ),
    },
    "InvarianceMonitor": {
        "invariance/monitor.py:on_validation_epoch_end": (296, "twice: four for each of 37 strengths of the changes"),
    },
    "ViewLogger": {
        "visualization/view_logger.py:on_train_batch_start": (6, "the pictures of an epoch are drawn on the host"),
        "utilities/apply_func.py:to_item": (6, "Lightning, when a figure is logged: each step here"),
    },
    "EmbeddingLogger": {
        "meets visualization/embedding_logger.py:on_validation_batch_end": (18, "the sample is chosen on the host"),
        "visualization/embedding_logger.py:on_validation_batch_end": (
            12,
            "images and labels of the sample are kept there",
        ),
        "visualization/embedding_logger.py:on_validation_epoch_end": (6, "the sample comes to the host to be drawn"),
        "utilities/apply_func.py:to_item": (6, "Lightning, when a figure is logged: each step here"),
    },
}
