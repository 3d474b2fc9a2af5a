"""The parts of a report: what each measures, what that means, and where the protocol is from."""

from collections.abc import Callable
from dataclasses import dataclass

from lightning_contrast.evaluation.report_card import (
    bias,
    classification,
    dense,
    interventions,
    robustness,
    shifts,
    structure,
    tuning,
)
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.cost import cost
from lightning_contrast.evaluation.report_card.result import Outcome


@dataclass(frozen=True)
class ReportPart:
    """A part of a report.

    Attributes:
        title: Its heading.
        meaning: What a number says, in a sentence.
        protocol: How it is measured.
        source: Address or reference.
        run: Measures one model.
        headline: Beginning of the name of the value in the summary; "" for none.
        higher_is_better: Whether a higher headline is better; None if that cannot be said.
        curve: Labels of the axes of its figure, x and y.
        log_x: Whether the x axis is logarithmic.
        by_default: Whether it is among the default parts.
    """

    title: str
    meaning: str
    protocol: str
    source: str
    run: Callable[[Context, str], Outcome]
    headline: str = ""
    higher_is_better: bool | None = True
    curve: tuple[str, str] = ("", "")
    log_x: bool = False
    by_default: bool = True


PARTS: dict[str, ReportPart] = {
    "knn": ReportPart(
        "Nearest neighbors",
        "How many test images get the class that their nearest training images vote for: nothing is trained.",
        "Weighted vote of the k nearest training images, exp(cosine / 0.07), test transform.",
        "https://arxiv.org/abs/2104.14294 (DINO), https://arxiv.org/abs/1805.01978",
        classification.knn,
        "top1",
        curve=("k", "accuracy"),
        log_x=True,
    ),
    "linear": ReportPart(
        "Linear probe",
        "How many test images a linear classifier on the frozen features gets right: the usual figure of papers.",
        "Logistic regression, its penalty chosen on held-out training images (CLIP); and SGD in published protocols "
        "with batches of 256. Features without augmentation.",
        "https://arxiv.org/abs/2103.00020 A.3, https://arxiv.org/abs/2002.05709, https://arxiv.org/abs/1911.05722",
        classification.linear,
        "top1",
        curve=("class", "accuracy"),
    ),
    "grid": ReportPart(
        "Linear grid",
        "The linear probe of DINOv2, which tries 13 learning rates at once.",
        "13 heads in one pass of SGD, the best on held-out training images is reported.",
        "https://arxiv.org/abs/2304.07193 B.3",
        classification.grid,
        "top1",
        by_default=False,
    ),
    "few_shot": ReportPart(
        "Few-shot episodes",
        "How well classes are told apart from one or five examples each; intervals are those of the episodes.",
        "100 episodes, nearest class mean of centered unit features, 15 queries per class.",
        "https://arxiv.org/abs/1911.04623",
        classification.shots,
        "5-way 5-shot",
    ),
    "label_efficiency": ReportPart(
        "Label efficiency",
        "What the first labels are worth: the accuracy for a share of the training labels.",
        "Logistic regression on standardized features, C = 0.1, three draws per share, at least one label per class.",
        "https://arxiv.org/abs/2002.05709 4.1 (shares)",
        classification.efficiency,
        "top1 with 10%",
        curve=("labels", "accuracy"),
        log_x=True,
    ),
    "retrieval": ReportPart(
        "Retrieval",
        "Whether the images nearest to a test image show the same class.",
        "Cosine similarity among the test images, the query excluded.",
        "recall@k, mean average precision as in scikit-learn",
        structure.retrieval,
        "mAP",
    ),
    "clusters": ReportPart(
        "Clusters",
        "Whether groups that k-means finds without labels are the classes; 0 ARI is chance.",
        "k-means with as many clusters as classes, 10 restarts, on unit features of the test images.",
        "scikit-learn; Hungarian assignment by SciPy",
        structure.clusters,
        "NMI",
    ),
    "calibration": ReportPart(
        "Calibration",
        "Whether a confidence of 80 % means that 80 % are right; 0 is perfect.",
        "Logistic regression on standardized features, C = 0.1; expected calibration error over 15 bins.",
        "https://arxiv.org/abs/1706.04599, https://arxiv.org/abs/1907.07174",
        classification.calibration,
        "ECE",
        higher_is_better=False,
        curve=("confidence", "accuracy"),
    ),
    "conformal": ReportPart(
        "Conformal sets",
        "How many classes a set must name to hold the true one nine times out of ten; 1 is best.",
        "Split-conformal APS, not randomized, calibrated on half of the test images, alpha = 0.1.",
        "https://arxiv.org/abs/2006.02544",
        classification.conformal,
        "mean set size",
        higher_is_better=False,
    ),
    "groups": ReportPart(
        "Worst group",
        "The accuracy where the model serves worst: by class, and by every other grouping of the images.",
        "Logistic regression on standardized features, C = 0.1; groups of five images or more: integer columns of the "
        "batches and `image_groups` of the DataModule.",
        "https://arxiv.org/abs/1911.08731",
        classification.groups,
        "worst class",
    ),
    "fine_tuning": ReportPart(
        "Fine-tuning",
        "What the weights are worth as a start: the accuracy if the whole network learns from a few labels.",
        "1 % and 10 % of each class, at least one image, random crops and flips; rates are chosen on other training "
        "images. For comparison, logistic regression on the frozen features of the same images.",
        "https://arxiv.org/abs/2002.05709 B.5, https://arxiv.org/abs/2006.07733 C.1; `FINE_TUNE_RECIPES`",
        tuning.fine_tuned,
        "top1 with 10%",
        by_default=False,
    ),
    "long_tail": ReportPart(
        "Long tail",
        "Whether rare classes are recognized if the labels are unevenly distributed.",
        "Logistic regression on standardized features, C = 0.1, of a subset whose class sizes fall exponentially, by "
        "100 from the largest to the smallest; means of the accuracies of classes.",
        "https://arxiv.org/abs/1901.05555, https://arxiv.org/abs/1904.05160",
        shifts.tail,
        "mean of classes",
        curve=("training images of a class", "accuracy"),
        log_x=True,
    ),
    "unseen_groups": ReportPart(
        "Unseen groups",
        "What a new artist, scanner or place costs: the head has seen no image of the group, the backbone may have.",
        "Logistic regression on standardized features, C = 0.1, without a group; the control sees as many training "
        "images of all groups. Groups are integer columns of the batches and `image_groups` of the DataModule.",
        "https://arxiv.org/abs/2007.01434 (leave one domain out)",
        shifts.groups_left_out,
        "lost on unseen",
        higher_is_better=False,
    ),
    "transfer": ReportPart(
        "Other data",
        "Whether the features serve data that the model was not made for.",
        "Linear probe and k-NN as above, trained and judged on each DataModule of `transfer=`.",
        "https://arxiv.org/abs/1805.08974, https://arxiv.org/abs/2103.00020 A.3",
        shifts.other_sets,
        "mean linear top1",
        by_default=False,
    ),
    "anomalies": ReportPart(
        "Anomalies",
        "Whether images of a class that was never seen look foreign; 0.5 is chance.",
        "Each class in turn is left out of the training images; AUROC of the distance to the 50th neighbor, and of the "
        "Mahalanobis distance.",
        "https://arxiv.org/abs/2204.06507, https://arxiv.org/abs/1807.03888",
        robustness.anomalies,
        "AUROC (k-NN)",
        curve=("class", "AUROC"),
    ),
    "corruptions": ReportPart(
        "Corruptions",
        "How much of the accuracy survives noise, blur, weather and compression.",
        "15 corruptions of a subset of the test images, and 4 held-out ones by the option `held_out_corruptions`; a "
        "logistic classifier of clean training images. The mCE is relative to the reference model, not to AlexNet.",
        "https://arxiv.org/abs/1903.12261",
        robustness.corruptions,
        "mean accuracy",
        curve=("severity", "accuracy"),
    ),
    "attacks": ReportPart(
        "Attacks",
        "How much of the accuracy survives changes of the pixels that nobody sees but that are made to mislead.",
        "PGD with 20 steps on a logistic head and the network, at most 8/255 per pixel, from a random start.",
        "https://arxiv.org/abs/1706.06083",
        interventions.attacks,
        "robust accuracy (8/255)",
        curve=("epsilon in 1/255", "accuracy"),
        by_default=False,
    ),
    "shortcut": ReportPart(
        "Shortcut",
        "Whether a classifier of the features learns a colored tag instead of the object, where the tag says the "
        "label in training: the accuracy if the tag is that of another class.",
        "Logistic regression on standardized features, C = 0.1, of images with a tag (and a background, if there are "
        "masks) in the color of the class.",
        "https://arxiv.org/abs/2004.07780 (idea)",
        interventions.shortcuts,
        "tag swapped",
    ),
    "cue_conflict": ReportPart(
        "Texture and shape",
        "Whether outlines or surfaces decide, if an outline is filled with the texture of another class.",
        "Logistic regression on standardized features, C = 0.1; share of the shape among decisions for either cue.",
        "https://arxiv.org/abs/1811.12231, with other images",
        interventions.cues,
        "shape share",
        higher_is_better=None,
    ),
    "bias": ReportPart(
        "Bias",
        "Whether features treat two groups of people differently, on pairs that differ in nothing else.",
        "Effect sizes of iEAT of both groups with each class against the others, with two-sided permutation p-values; "
        "retrieval of the class by group; a linear probe of the group (0.5 by chance).",
        "https://arxiv.org/abs/2010.15052",
        bias.audit,
        "largest effect",
        higher_is_better=False,
    ),
    "invariance": ReportPart(
        "Invariance",
        "How similar features stay when the image is changed; 1 is invariant, good or bad depending on the task.",
        "Mean cosine similarity of centered features to those of the original, by change and strength.",
        "`InvarianceMonitor`",
        robustness.invariance,
        "mean",
        higher_is_better=None,
        curve=("strength", "cosine similarity"),
    ),
    "geometry": ReportPart(
        "Geometry",
        "How many dimensions are in use, and whether the features have collapsed.",
        "Spectrum of the test features; alignment and LiDAR of SimCLR views of some test images.",
        "https://arxiv.org/abs/2210.02885, https://arxiv.org/abs/2202.05808, https://arxiv.org/abs/2312.04000, "
        "https://arxiv.org/abs/2005.10242",
        structure.shape,
        "effective rank",
        higher_is_better=None,
        curve=("rank", "share of the variance"),
        log_x=True,
    ),
    "similarity": ReportPart(
        "Similarity of models",
        "Whether two models, or two layers of one, see the images alike: 1 up to rotation and scale, 0 not at all.",
        "Unbiased linear CKA on the test images; of layers, on flattened activations of some of them.",
        "https://arxiv.org/abs/1905.00414, https://arxiv.org/abs/2010.15327",
        structure.similarity,
        curve=("layer", "layer"),
        higher_is_better=None,
    ),
    "segmentation": ReportPart(
        "Segmentation",
        "Whether the features of patches say what is where, on scenes of two emoji that are not part of the data.",
        "Classes of pixels from alpha: ground and nine groups, things of the test are new. BatchNorm and a 1 x 1 "
        "convolution on frozen patches by AdamW; and the vote of 30 patches, exp(cosine / 0.02).",
        "https://arxiv.org/abs/2304.07193 7.4, https://arxiv.org/abs/2306.01667",
        dense.segmentation,
        "mIoU (linear)",
    ),
    "attention": ReportPart(
        "Attention",
        "Whether a vision transformer attends to things and not to the ground of scenes of two emoji.",
        "Class token of the last layer; the patches with 60 % of the attention against alpha, the best head of each "
        "image; and whether the strongest patch of the mean of the heads lies on a thing.",
        "https://arxiv.org/abs/2104.14294 4.2.2, https://arxiv.org/abs/1608.00507",
        dense.attention,
        "Jaccard (best head)",
    ),
    "detection": ReportPart(
        "Detection",
        "Whether things can be found from the frozen map, on scenes of two emoji.",
        "torchvision's Faster R-CNN, one class; region proposals and box head trained by AdamW, the backbone frozen.",
        "https://arxiv.org/abs/1506.01497",
        dense.detection,
        "AP50",
        by_default=False,
    ),
    "cost": ReportPart(
        "Cost",
        "What a feature costs; times, memory and energy are of this machine, and not part of report.json.",
        "Parameters, floating point operations by torch, the fastest of three passes of 64 images, memory of one; with "
        "the option `energy`, energy by codecarbon.",
        "torch.utils.flop_counter, https://github.com/mlco2/codecarbon",
        cost,
        "parameters",
        higher_is_better=False,
    ),
}
"""All parts of `report` by name."""
