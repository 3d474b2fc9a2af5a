"""Every loss on the pretended device, forward and backward: the value and the gradients of the CPU, and no fault."""

import pytest
import torch
from torch import nn

from lightning_contrast import losses
from tests.device.pretended import OnDevice, PretendedDevice, in_own_process

# How each is called with two batches of rows (B, D) that require a gradient, and labels (B,).
CALLS = {
    "average_layers": lambda a, b, y: losses.average_layers(torch.stack([a, b]).view(2, 2, 4, 6), top_k=1),
    "data2vec_loss": lambda a, b, y: losses.data2vec_loss(a, b, beta=1.0),
    "jepa_loss": lambda a, b, y: losses.jepa_loss(
        a.view(4, 2, 6), b.view(2, 4, 6), y[:4].view(2, 2, 1).repeat(1, 1, 2)
    ),
    "masked_l1_loss": lambda a, b, y: losses.masked_l1_loss(
        _images(b), _images(a), y[:4].view(1, 2, 2) > 0, patch_size=2
    ),
    "masked_pixel_loss": lambda a, b, y: losses.masked_pixel_loss(
        _images(b), a.view(1, 4, 12), y[None, :4] > 0, patch_size=2, normalize_pixels=True
    ),
    "patchify": lambda a, b, y: losses.patchify(_images(a), patch_size=2),
    "pixel_targets": lambda a, b, y: losses.pixel_targets(_images(a), patch_size=2, normalize_pixels=True),
    "unpatchify": lambda a, b, y: losses.unpatchify(a.view(1, 4, 12), (2, 2), patch_size=2),
    "vjepa_loss": lambda a, b, y: losses.vjepa_loss([a.view(2, 4, 6)], b.view(2, 4, 6), [y.view(2, 4)]),
    "attend_regions": lambda a, b, y: losses.attend_regions(*_places(a, b), lengths=y[:4] + 1),
    "cpc_all_times_loss": lambda a, b, y: losses.cpc_all_times_loss(
        *(_places(b, x)[1].flatten(2).mT for x in (b, a)), torch.ones_like(b[:6, :6])[None]
    ),
    "cpc_loss": lambda a, b, y: losses.cpc_loss(_places(a, b)[1], _places(b, a)[1], offset=1),
    "cpc_sampled_loss": lambda a, b, y: losses.cpc_sampled_loss(
        *(_places(b, x)[1] for x in (b, a)), torch.ones_like(b[:6, :6])[None], y[None], negatives=2, skip=0
    ),
    "cpc_time_loss": lambda a, b, y: losses.cpc_time_loss(
        *(_places(b, x)[1].flatten(2).mT for x in (b, a)), torch.ones_like(b[:6, :6])[None], *2 * (y[:4].view(4, 1, 1),)
    ),
    "gloria_global_loss": lambda a, b, y: losses.gloria_global_loss(a, b, groups=y),
    "gloria_local_loss": lambda a, b, y: losses.gloria_local_loss(*_places(a, b)[::-1], y[:4] + 1, groups=y[:4]),
    "region_attention": lambda a, b, y: losses.region_attention(*_places(a, b)),
    "alignment": lambda a, b, y: losses.alignment(a, b),
    "barlow_twins_loss": lambda a, b, y: losses.barlow_twins_loss(a, b, off_diagonal_weight=0.005),
    "byol_loss": lambda a, b, y: losses.byol_loss(a, b.detach()),
    "clip_loss": lambda a, b, y: losses.clip_loss(a, b, logit_scale=a.sum().exp(), weighting="hard", groups=y),
    "debiased_nt_xent": lambda a, b, y: losses.debiased_nt_xent(a, b, temperature=0.5, tau_plus=0.1),
    "decoupled_nt_xent": lambda a, b, y: losses.decoupled_nt_xent(a, b, temperature=0.1, sigma=0.5),
    "dense_info_nce": lambda a, b, y: losses.dense_info_nce(
        *(_places(x, b)[1].flatten(2).detach() + x.sum() * (x is a) for x in (a, b, a, b)), temperature=0.1
    ),
    "dino_loss": lambda a, b, y: losses.dino_loss(
        [a, b, a + b], [a.detach(), b.detach()], a.detach()[0], student_temperature=0.1, teacher_temperature=0.04
    ),
    "dino_loss sinkhorn": lambda a, b, y: losses.dino_loss(
        [b, a], [a.detach()], None, student_temperature=0.1, teacher_temperature=0.04, centering="sinkhorn"
    ),
    "gram_loss": lambda a, b, y: losses.gram_loss(a.view(2, 4, 6), b.view(2, 4, 6), clip_negative=True),
    "hard_negative_nt_xent": lambda a, b, y: losses.hard_negative_nt_xent(a, b, temperature=0.5, tau_plus=0.1, beta=1),
    "ibot_patch_loss": lambda a, b, y: losses.ibot_patch_loss(
        a.view(2, 4, 6),
        b.detach().view(2, 4, 6),
        a.detach()[0],
        y.view(2, 4) > 0,
        student_temperature=0.1,
        teacher_temperature=0.04,
    ),
    "ijepa_loss": lambda a, b, y: losses.ijepa_loss(a, b.detach()),
    "info_nce": lambda a, b, y: losses.info_nce(a, b, temperature=0.1),
    "info_nce queue": lambda a, b, y: losses.info_nce(
        a,
        b.detach(),
        b.detach().flip(0),
        temperature=a.sum().exp(),
        negatives_mask=y > 0,
        groups=y,
        negatives_groups=y,
        weighting="debiased",
    ),
    "koleo_loss": lambda a, b, y: losses.koleo_loss(a),
    "log_det_loss": lambda a, b, y: losses.log_det_loss(a),
    "bilinear_loss": lambda a, b, y: losses.bilinear_loss(a, b, weight=a.T @ b),
    "clip_distillation_loss": lambda a, b, y: losses.clip_distillation_loss(
        a, b, b.detach(), a.detach(), logit_scale=a.sum().exp(), teacher_logit_scale=10.0
    ),
    "margin_contrastive_loss": lambda a, b, y: losses.margin_contrastive_loss(a, b, y > 0, margin=1.0),
    "masked_patch_loss": lambda a, b, y: losses.masked_patch_loss(
        a, b.detach(), a.detach()[0], y, count=3, student_temperature=0.1, teacher_temperature=0.04
    ),
    "mochi_negatives": lambda a, b, y: losses.mochi_negatives(a, b, hardest=4, pair_mixes=3, query_mixes=2),
    "moco_v3_loss": lambda a, b, y: losses.moco_v3_loss(a, b, a.detach(), b.detach(), temperature=0.2),
    "msn_loss": lambda a, b, y: losses.msn_loss(
        torch.cat([a, a]),
        b.detach(),
        a[:3],
        temperature=0.1,
        target_sharpen_temperature=0.25,
        me_max_weight=1.0,
        sinkhorn=True,
    ),
    "negative_cosine": lambda a, b, y: losses.negative_cosine(a, b.detach()),
    "nt_xent": lambda a, b, y: losses.nt_xent(a, b, temperature=0.1),
    "nt_xent learned": lambda a, b, y: losses.nt_xent(a, b, temperature=a.sum().exp(), groups=y, tile_size=3),
    "nt_xent hard": lambda a, b, y: losses.nt_xent(a, b, temperature=0.5, weighting="hard"),
    "nt_xent heated": lambda a, b, y: losses.nt_xent(a, b, temperature=0.5, weighting="heated"),
    "nt_xent weighted": lambda a, b, y: losses.nt_xent(a, b, temperature=0.5, weighting=losses.Negatives("top_k", k=3)),
    "siglip_loss": lambda a, b, y: losses.siglip_loss(a, b, logit_scale=a.sum().exp(), logit_bias=b.sum()),
    "sinkhorn": lambda a, b, y: losses.sinkhorn(a.detach(), epsilon=0.05, iterations=3, mask=y > 0),
    "spectral_contrastive_loss": lambda a, b, y: losses.spectral_contrastive_loss(a, b, mu=1.0),
    "sup_con": lambda a, b, y: losses.sup_con(a, b, y, temperature=0.1, base_temperature=0.07),
    "swav_loss": lambda a, b, y: losses.swav_loss(
        [a, b, a + b],
        temperature=0.1,
        epsilon=0.05,
        iterations=3,
        queue_scores=[a.detach(), b.detach()],
        queue_mask=y > 0,
    ),
    "tclr_global_local_loss": lambda a, b, y: losses.tclr_global_local_loss(_moments(a), _moments(b), temperature=0.1),
    "tclr_instance_loss": lambda a, b, y: losses.tclr_instance_loss(_moments(a), temperature=0.1),
    "tclr_local_loss": lambda a, b, y: losses.tclr_local_loss(_moments(a), temperature=0.1),
    "triplet_loss": lambda a, b, y: losses.triplet_loss(a, b, b.flip(0), margin=1.0),
    "uniformity": lambda a, b, y: losses.uniformity(a),
    "vicreg_loss": lambda a, b, y: losses.vicreg_loss(a, b),
    "epps_pulley": lambda a, b, y: losses.epps_pulley(a),
    "lejepa_loss": lambda a, b, y: losses.lejepa_loss(_views(a, b), _views(b), _drawn(a), regularizer_weight=0.1),
    "mmcr_loss": lambda a, b, y: losses.mmcr_loss(_views(a, b).transpose(0, 1), local_weight=0.1),
    "sigreg_loss": lambda a, b, y: losses.sigreg_loss(a, _drawn(a)),
    "sliced_gaussian_loss": lambda a, b, y: losses.sliced_gaussian_loss(_views(a, b), _drawn(a)),
    "tico_loss": lambda a, b, y: losses.tico_loss(a, b.detach(), b.detach()[:6]),
    "view_invariance": lambda a, b, y: losses.view_invariance(_views(a, b)),
    "visreg_loss": lambda a, b, y: losses.visreg_loss(_views(a, b), _drawn(a)),
    "w_mse_loss": lambda a, b, y: losses.w_mse_loss(
        _views(a, b), losses.draw_permutations(len(a), iterations=2), whitening_size=8
    ),
    "vicregl_global_loss": lambda a, b, y: losses.vicregl_global_loss([a, b, a * b]),
    "vicregl_local_loss": lambda a, b, y: losses.vicregl_local_loss(
        [x.unflatten(0, (4, 2)) for x in (a, b)],
        [x[:, :2].detach().view(4, 2, 1, 2) for x in (a, b)],
        matches=(1, 2),
        all_feature_matches=False,
    ),
    "compress_loss": lambda a, b, y: losses.compress_loss(a, b, a.detach(), b, temperature=0.1),
    "crd_loss": lambda a, b, y: losses.crd_loss(a, b, a, b, *_own_and_next(y), temperature=0.1, samples=len(a)),
    "crd_normalizers": lambda a, b, y: sum(
        losses.crd_normalizers(a, b, a, b, *_own_and_next(y), temperature=0.1, samples=len(a)), start=a.sum()
    ),
    "disco_loss": lambda a, b, y: losses.disco_loss(a, b, b, a),
    "GroupDRO": lambda a, b, y: losses.GroupDRO(3).to(a.device)(a, y % 6, y % 3),
    "fair_supcon_loss": lambda a, b, y: losses.fair_supcon_loss(
        torch.stack([a, b], dim=1), y, y % 2, temperature=0.1, group_norm=True
    ),
    "hsic_loss": lambda a, b, y: losses.hsic_loss(a, y),
    "hint_loss": lambda a, b, y: losses.hint_loss(a, b),
    "kd_loss": lambda a, b, y: losses.kd_loss(a, b, temperature=4.0),
    "noise_contrastive_loss": lambda a, b, y: losses.noise_contrastive_loss(a.sigmoid(), 9),
    "rkd_loss": lambda a, b, y: losses.rkd_loss(a, b, distance_weight=1.0, angle_weight=1.0),
    "rocl_loss": lambda a, b, y: losses.rocl_loss(a, b, a.flip(0), temperature=0.5),
    "seed_loss": lambda a, b, y: losses.seed_loss(a, b, b, student_temperature=0.2, teacher_temperature=0.1),
    "simreg_loss": lambda a, b, y: losses.simreg_loss(a, b),
}


# `masked_patch_loss` takes the masked patches; its special case for all patches selects them by a mask.
DOCUMENTED = {
    "ibot_patch_loss": {
        "losses/distillation.py:ibot_patch_loss": (3, "selects the masked patches"),
        "_dynamo/eval_frame.py:_fn": (1, "the gradient of that selection"),
    },
    "mmcr_loss": {"losses/redundancy.py:mmcr_loss": (2, "a singular value decomposition checks that it converged")},
}


WITHOUT_GRADIENT = ("sinkhorn", "mochi_negatives", "average_layers", "pixel_targets")


def test_every_loss_is_called():
    draws = {name for name in losses.__all__ if name.startswith("draw_")}  # on the CPU, as all random numbers
    assert {name.split()[0] for name in CALLS} == set(losses.__all__) - {"Negatives"} - draws


def _places(a, b):
    """Return 3 words (4, 6, 3) out of 8 rows (8, 6), and maps of 2 x 1 places (4, 6, 2, 1)."""
    words = a.unflatten(0, (4, 2)).mT
    return torch.cat([words, words[..., :1]], dim=2), b.unflatten(0, (4, 2)).mT[..., None]


def _own_and_next(labels):
    """Return rows of memories: those of the labels, and as one negative each, that of another label."""
    return labels, ((labels + 1) % 3)[:, None]


def _views(*rows):
    return torch.stack(rows)


def _drawn(rows):
    return losses.draw_directions(rows, slices=3)


def _images(rows):
    """Return an image of 4 x 4 pixels out of 8 rows, (1, 3, 4, 4)."""
    return rows.reshape(1, 3, 4, 4)


def _moments(rows):
    """Return the embeddings of two augmentations of two clips of two videos, (2, 2, 2, 6)."""
    return rows.unflatten(0, (2, 2, 2))


def _run(name, device):
    generator = torch.Generator().manual_seed(0)
    rows = [0.3 * torch.randn(8, 6, generator=generator) for _ in range(2)]
    a, b = (nn.Parameter(row.to(device)) for row in rows)
    torch.manual_seed(0)
    value = CALLS[name](a, b, (torch.arange(8) % 3).to(device))
    if value.requires_grad:
        value.mean().backward()
    return value.detach(), a.grad


@pytest.mark.parametrize("name", CALLS)
@in_own_process
def test_a_loss_reads_nothing_and_gives_the_number_of_the_cpu(name):
    with PretendedDevice(DOCUMENTED.get(name)) as pretended:
        value, gradient = _run(name, pretended.device)
    expected, of_cpu = _run(name, torch.device("cpu"))
    assert isinstance(value, OnDevice)
    torch.testing.assert_close(value.host, expected)
    assert (gradient is None) == (name in WITHOUT_GRADIENT)
    if gradient is not None:
        torch.testing.assert_close(gradient.host, of_cpu)
