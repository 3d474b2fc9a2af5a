"""View policies for images that are not photographs.

They are made as the published ones of `lightning_contrast.augment`, pass the same tests and take the same arguments:
``size`` first, ``mean`` and ``std``, and the `ViewOptions`. `docs/domains.md` says what each keeps and why.
"""

from lightning_contrast.augment.domains.defects import DefectImages, SyntheticDefects
from lightning_contrast.augment.domains.detail import document_views, fine_grained_views
from lightning_contrast.augment.domains.driving import driving_views
from lightning_contrast.augment.domains.histology import histology_views
from lightning_contrast.augment.domains.industry import industrial_views
from lightning_contrast.augment.domains.medical import chest_xray_views, ct_views, mri_views
from lightning_contrast.augment.domains.microscopy import microscopy_views
from lightning_contrast.augment.domains.options import DomainOptions
from lightning_contrast.augment.domains.satellite import satellite_views

__all__ = [
    "DefectImages",
    "DomainOptions",
    "SyntheticDefects",
    "chest_xray_views",
    "ct_views",
    "document_views",
    "driving_views",
    "fine_grained_views",
    "histology_views",
    "industrial_views",
    "microscopy_views",
    "mri_views",
    "satellite_views",
]
