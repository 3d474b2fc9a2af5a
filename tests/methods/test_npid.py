"""NPID's own properties: its two losses, its bank, its need of indices."""

import math

import pytest
import torch
import torch.nn.functional as F

import lightning_contrast as lc
from lightning_contrast.losses import noise_contrastive_loss
from tests.methods.cases import CASES, TinyBackbone, make
from tests.methods.test_contract import BATCH, Data, data, run_step, step_batch, trainer
from tests.tolerances import NETWORK, near

CASE = CASES["NPID"]


def unit_bank(module):
    return F.normalize(module.bank.features.double(), dim=1)


def test_softmax_over_all_images():
    module = make("NPID", temperature=0.3)
    (view,), _, indices = batch = step_batch(CASE)
    projection = F.normalize(module.projector(module.backbone(view)), dim=1).double()
    expected = F.cross_entropy(projection @ unit_bank(module).T / 0.3, indices)
    assert run_step(module, batch)["loss"].item() == near(expected.item())


def test_noise_contrastive_estimation_equals_the_reference(monkeypatch):
    module = make("NPID noise", temperature=0.3)
    (view,), _, indices = batch = step_batch(CASE)
    drawn = torch.arange(BATCH * 5).reshape(BATCH, 5) % 32
    monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn)
    projection = F.normalize(module.projector(module.backbone(view)), dim=1).double().detach()
    bank = unit_bank(module)
    odds = [[math.exp(projection[i] @ bank[j] / 0.3) for j in [indices[i], *drawn[i]]] for i in range(BATCH)]
    z = 32 * sum(map(sum, odds)) / (BATCH * 6)
    noise, total = 5 / 32, 0.0
    for row in odds:
        p = [value / z for value in row]
        total -= math.log(p[0] / (p[0] + noise + 1e-7))
        total -= sum(math.log(noise / (q + noise + 1e-7)) for q in p[1:])
    assert run_step(module, batch)["loss"].item() == near(total / BATCH)
    assert module.normalizer.item() == near(z)
    module.bank.push(torch.ones(BATCH, 8), indices)
    run_step(module, batch)
    assert module.normalizer.item() == near(z), "Z is taken once"
    assert "normalizer_bits" in module.state_dict()


def test_noise_contrastive_loss_of_equal_odds():
    probabilities = torch.full((3, 5), 1 / 32, dtype=torch.float64)  # noise mass 4 / 32
    expected = -math.log(1 / 5) - 4 * math.log(4 / 5)
    assert noise_contrastive_loss(probabilities, 32).item() == near(expected, NETWORK)


def test_rows_move_half_way_after_their_use(tmp_path):
    module = make("NPID", lr=1e-12)
    before = module.bank.features.clone()
    trainer(tmp_path, CASE, epochs=1, limit_val_batches=0).fit(module, data("NPID"))
    assert not (before == module.bank.features).all(1).any(), "every image was seen once"
    torch.testing.assert_close(module.bank.features.norm(dim=1), torch.ones(32))
    images = step_batch(CASE)[0][0]
    out = run_step(module, [[images], torch.zeros(BATCH), torch.arange(BATCH)])
    expected = F.normalize(0.5 * module.bank.features[:BATCH] + 0.5 * out["keys"], dim=1)
    module.bank.push(out["keys"], out["indices"])
    torch.testing.assert_close(module.bank.features[:BATCH], expected)


def test_missing_indices_name_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"`batch` must hold sample indices for NPID, got 'none'\. Set `indices=True`"):
        trainer(tmp_path, CASE, epochs=1, limit_val_batches=0).fit(make("NPID"), Data(BATCH))


def test_too_small_a_bank_names_the_mend():
    batch = step_batch(CASE)
    with pytest.raises(ValueError, match=r"`indices` must lie in \[0, 5\).*Set `num_samples`"):
        run_step(make("NPID", num_samples=5), batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 1}, "`num_samples` must be >= 2"),
        ({"num_negatives": -1}, "`num_negatives` must be >= 0"),
        ({"temperature": 0.0}, "`temperature` must be > 0"),
        ({"momentum": 1.5}, r"`momentum` must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lc.NPID(TinyBackbone(), **({"num_samples": 9} | arguments))


def test_schedule_is_the_references_at_its_length():
    module = lc.NPID(TinyBackbone(), 9)
    assert [module.lr_factor(step, 0, 200) for step in (119, 120, 160)] == pytest.approx([1, 0.1, 0.01])
