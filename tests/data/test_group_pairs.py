"""GroupPairs: partners of one group, roles, exact resume, what is left out, and refused arguments."""

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

import lightning_contrast as lc
from lightning_contrast.data import EmojiDataModule, GroupPairs, InMemoryDataModule
from tests.methods.cases import TinyBackbone
from tests.methods.test_contract import assert_equal_states, state
from tests.tolerances import assert_same_bits

LABELS = [0, 1, 0, 2, 1, 0, 3, -1]


class Numbers(InMemoryDataModule):
    """Images of one pixel whose value is their row."""

    def read(self, split):
        images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1)
        return images, torch.tensor(LABELS)


class Records(Dataset):
    """Dicts, or tuples, with a float item that holds its row."""

    def __init__(self, *, as_dict):
        self.as_dict = as_dict

    def __len__(self):
        return 8

    def __getitem__(self, row):
        item = torch.full((3,), float(row))
        if self.as_dict:
            return {"image": item, "label": LABELS[row], "patient": f"p{row % 3}", "eye": "lr"[row // 4]}
        return item, LABELS[row], f"p{row % 3}"


def read(pairs, epoch=0):
    """Return the rows of a and b, the labels and the groups of an epoch."""
    loader = pairs.train_dataloader()
    loader.sampler.set_epoch(epoch)
    tuples = [[b["image"], b["label"], b["index"]] if isinstance(b, dict) else b for b in loader]
    batches = [([a.flatten(1)[:, 0].long(), b.flatten(1)[:, 0].long()], *rest) for (a, b), *rest in tuples]
    return [torch.cat(parts).tolist() for parts in zip(*([*views, *rest] for views, *rest in batches), strict=True)]


@pytest.fixture
def warned():
    with pytest.warns(UserWarning, match="leaves out 3 of 8 items, which have no partner"):
        yield


@pytest.mark.parametrize(
    "source", [Numbers(), Records(as_dict=True), Records(as_dict=False)], ids=["tensor", "dict", "tuple"]
)
def test_each_item_is_visited_once_with_another_of_its_label(source, warned):
    a, b, labels, groups = read(GroupPairs(source, batch_size=1))
    assert sorted(a) == [0, 1, 2, 4, 5]
    assert [LABELS[row] for row in a] == [LABELS[row] for row in b] == labels
    assert all(one != other for one, other in zip(a, b, strict=True))
    assert len({*zip(groups, labels, strict=True)}) == 2


def test_partners_change_with_the_epoch_and_are_a_function_of_seed_and_epoch():
    emoji = EmojiDataModule()
    first, again, other = (
        next(iter(GroupPairs(emoji, batch_size=64, seed=seed).train_dataloader())) for seed in (0, 0, 1)
    )
    assert_same_bits(first, again)
    assert not torch.equal(first[0][0], other[0][0])
    pairs = GroupPairs(Numbers(), key=[0] * 8, batch_size=1)
    partners = [dict(zip(*read(pairs, epoch)[:2], strict=True)) for epoch in range(6)]
    assert len({one[0] for one in partners}) > 1
    drawn = {other for one in partners for other in one.values()}
    assert drawn == set(range(8))


@pytest.mark.parametrize("key", ["patient", 2, lambda record: record["patient"], [f"p{row % 3}" for row in range(8)]])
def test_forms_of_a_key(key):
    a, b, *_ = read(GroupPairs(Records(as_dict=key != 2), key=key, batch_size=1))
    assert sorted(a) == list(range(8))
    assert [row % 3 for row in a] == [row % 3 for row in b]


@pytest.mark.parametrize("role", ["eye", lambda record: record["eye"], torch.arange(8) // 4])
def test_roles_say_which_item_comes_first(role):
    a, b, *_ = read(GroupPairs(Records(as_dict=True), key="patient", role=role, batch_size=1))
    assert sorted(a) == [0, 1, 2, 3]
    assert all(row >= 4 for row in b)
    assert [row % 3 for row in a] == [row % 3 for row in b]


def test_the_drawings_of_two_artists():
    emoji = EmojiDataModule()
    things = torch.arange(1246).repeat(2)
    pairs = GroupPairs(emoji, key=things, role=torch.arange(2492) // 1246, batch_size=1246)
    (a, b), labels, groups = next(iter(pairs.train_dataloader()))
    noto, fluent = emoji.artists("train")
    assert torch.equal(a, noto[groups])
    assert torch.equal(b, fluent[groups])
    assert torch.equal(labels, emoji.labels("train")[groups])
    assert torch.equal(pairs.val_dataloader().dataset.images, emoji.images("val"))


@pytest.mark.slow
def test_dicts_keep_the_other_entries_of_the_first_item():
    emoji = EmojiDataModule(captions=True, templates=["{}", "a drawing of {}"])
    pairs = GroupPairs(emoji, key="text", role="artist", batch_size=1246)
    batch = next(iter(pairs.train_dataloader()))
    groups, names = batch["index"], emoji.captions("train")
    assert set(batch) == {"image", "text", "label", "index", "artist"}
    assert all(
        torch.equal(*pair) for pair in zip(batch["image"], [d[groups] for d in emoji.artists("train")], strict=True)
    )
    assert torch.equal(batch["label"], emoji.labels("train")[groups])
    assert batch["artist"].tolist() == [0] * 1246
    assert [text.removeprefix("a drawing of ") for text in batch["text"]] == [names[row] for row in groups.tolist()]
    assert 0.4 < sum(text.startswith("a drawing") for text in batch["text"]) / 1246 < 0.6
    batch = next(iter(GroupPairs(Records(as_dict=True), key="eye", batch_size=2).train_dataloader()))
    patients = [f"p{row % 3}" for row in batch["image"][0][:, 0].long().tolist()]
    assert batch["patient"] == patients


class Policy(torch.nn.Module):
    size, mean, std = 32, None, None

    def forward(self, images):
        return [self.eval_transform(images)]

    def eval_transform(self, images):
        return images.float() / 255


def fit(tmp_path, *, epochs=2, ckpt_path=None, save_after=None):
    torch.manual_seed(0)
    emoji = EmojiDataModule()
    things = torch.arange(1246).repeat(2)
    module = lc.PairContrast(TinyBackbone(), hidden_dim=16, projection_dim=8, lr=0.01)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saved = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=epochs, limit_val_batches=1, callbacks=[lc.ViewAugmentation(Policy(), seed=0), saved], **quiet
    )
    trainer.fit(module, GroupPairs(emoji, key=things, batch_size=623), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
@pytest.mark.slow
def test_a_run_resumes_exactly_in_the_middle_of_an_epoch(tmp_path):
    whole, trainer = fit(tmp_path / "whole")
    assert trainer.global_step == 8
    resumed, _ = fit(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "step=6.ckpt")
    assert_equal_states(state(whole), state(resumed))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"key": [0, 1]}, ValueError, "`key` must have 8 values, one per item, got 2"),
        ({"key": list(range(8))}, ValueError, "`key` must give at least one group of two items, got '8 groups'"),
        ({"key": "patient"}, TypeError, r"`key` must lead to a value of each item \('patient' does not\)"),
        ({"key": [0] * 8, "role": [0] * 8}, ValueError, r"`role` must have two different values, got \[0\]"),
        ({"key": [0] * 8, "batch_size": 9}, ValueError, "`batch_size` must be at most 8"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(settings, error, text):
    with pytest.raises(error, match=text):
        GroupPairs(Numbers(), **({"batch_size": 1} | settings)).train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (((n for n in range(3)),), TypeError, "`source` must hold a training dataset"),
        ((Numbers(), {"batch_size": 0}), ValueError, "`batch_size` must be >= 1"),
        ((Numbers(), {"num_workers": -1}), ValueError, "`num_workers` must be >= 0"),
    ],
)
def test_refused_arguments(arguments, error, text):
    source, settings = arguments[0], arguments[1] if len(arguments) > 1 else {}
    with pytest.raises(error, match=text):
        GroupPairs(source, **settings)
