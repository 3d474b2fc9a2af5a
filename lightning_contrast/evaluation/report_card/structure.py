"""Parts of a report about neighbors, clusters, geometry and the similarity of models."""

import math

import torch

from lightning_contrast.augment import simclr_views
from lightning_contrast.evaluation.protocols import (
    cluster_scores,
    describe_geometry,
    geometry,
    layer_similarity,
    retrieved,
)
from lightning_contrast.evaluation.report_card.context import Context
from lightning_contrast.evaluation.report_card.result import Outcome, add_mean
from lightning_contrast.metrics import cka
from lightning_contrast.seeding import derived_seed, seeded

_CKA_ROWS = 2048


def retrieval(context: Context, model: str) -> Outcome:
    """Retrieval of images of the same class."""
    test = context.labeled(model).test
    found = retrieved(*test, k=[k for k in (1, 5, 10) if k < len(test.labels)])
    outcome = Outcome()
    for name, values in found.items():
        add_mean(outcome, {"map": "mAP"}.get(name, name), values.cpu(), context.seed)
    return outcome


def clusters(context: Context, model: str) -> Outcome:
    """k-means against the classes."""
    found = cluster_scores(*context.labeled(model).test, seed=context.seed)
    return Outcome(values={"NMI": found["nmi"], "ARI": found["ari"], "accuracy (Hungarian)": found["accuracy"]})


def shape(context: Context, model: str) -> Outcome:
    """Geometry of the features of test images, and of views of some of them."""
    features = context.test[model].features
    number, count = int(context.options["view_images"]), int(context.options["views"])
    views = None
    if number >= 2 and count >= 2:
        images, _ = context.unit_images(model, number)
        channels, edge = images.shape[1], min(images.shape[-2:])
        policy = simclr_views(edge, channels=channels, color=channels == 3)
        with seeded(derived_seed(context.seed, 9), images.device):
            drawn = [view for _ in range(-(-count // 2)) for view in policy(images)][:count]
        views = torch.stack([context.encode(model, view.clamp(0, 1)) for view in drawn], 1)
    found = geometry(features, views=views, seed=context.seed)
    names = {
        "effective_rank": "effective rank",
        "rankme": "RankMe",
        "participation_ratio": "participation ratio",
        "alpha_req": "alpha-ReQ",
        "lidar": "LiDAR",
        "dead_dims": "constant dimensions",
        "std": "spread (1: uniform)",
    }
    spectrum = found.pop("spectrum")
    values = {names.get(name, name): value for name, value in found.items()}
    outcome = Outcome(values=values, notes=[describe_geometry(found, features.shape[1])])
    outcome.curves["eigenvalues"] = [(rank, value) for rank, value in enumerate(spectrum, 1) if value > 1e-9]
    return outcome


def similarity(context: Context, model: str) -> Outcome:
    """Linear CKA with all models, and of the layers of each."""
    outcome = Outcome()
    own = context.test[model].features
    step = max(1, len(own) // _CKA_ROWS)
    for other, found in context.test.items():
        if other != model:
            value = float(cka(own[::step], found.features[::step], unbiased=True))
            outcome.values[f"CKA with {other}"] = None if math.isnan(value) else value
    if len(context.test) == 1:
        outcome.notes.append("Only one model: nothing to compare with.")
    images, _ = context.images(int(context.options["view_images"]))
    if len(images) >= 4:
        try:
            found_layers = layer_similarity(context.subjects[model].module, context.inputs(model, images))
        except torch.OutOfMemoryError:
            raise  # says nothing about the network
        except (ValueError, TypeError, RuntimeError) as error:
            outcome.notes.append(f"Layers are not compared: {' '.join(str(error).split())}")
            return outcome
        if len(found_layers.names) > 1:
            for name, line in zip(found_layers.names, found_layers.cka.tolist(), strict=True):
                outcome.curves[name] = [(place, value) for place, value in enumerate(line) if math.isfinite(value)]
            outcome.notes.append(f"Layers: {len(images)} test images.")
    return outcome
