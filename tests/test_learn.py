"""The learning table: every row builds, a finished run is not trained again, settings never see the test things."""

import json
import sys

import pytest

from benchmarks import learn

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def test_every_row_has_a_recipe_and_carries_its_seed():
    rows = [*learn.RAW, *learn.RANDOM, *learn.TRAINED, *learn.METHODS, *learn.VARIANTS]
    assert len(rows) == len(set(rows))
    for row in rows:
        config = learn.settings_of(row, 7, None, [], "32-true")
        seeds = [c["init_args"]["seed"] for c in config["trainer"]["callbacks"] if c["class_path"] == "StepSeed"]
        data = learn.data_arguments(config)
        assert len(seeds) == 1
        assert {config["seed_everything"], *seeds, *(arguments["seed"] for arguments in data)} == {7}
        assert data[-1]["validation_fold"] is None
        assert not any("validation_fold" in arguments for arguments in data[:-1])
        assert not {c["class_path"] for c in config["trainer"]["callbacks"]} & set(learn.PROBES)


def test_changes_reach_their_place():
    changes = ["model.init_args.lr=0.5", "trainer.callbacks.0.init_args.policy.init_args.size=16"]
    config = learn.settings_of("simclr", 0, 2, changes, "32-true")
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["trainer"]["callbacks"][0]["init_args"]["policy"]["init_args"]["size"] == 16
    assert config["data"]["init_args"]["validation_fold"] == 2
    other = learn.settings_of("simclr", 0, 2, [], "32-true")
    assert learn.fingerprint(config) != learn.fingerprint(other) == learn.fingerprint(dict(other))


def test_settings_are_never_changed_on_the_test_things(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["learn", "--rows", "simclr", "--set", "model.init_args.lr=1.0"])
    with pytest.raises(SystemExit):
        learn.main()
    assert "--fold" in capsys.readouterr().err


def record(row, seed, knn):
    figures = {"knn": knn, "linear": 0.5, "recall@1": 0.25, "seconds": 10.0}
    return {"row": row, "seed": seed, "epochs": 3, "config": "x"} | figures


def test_table_gives_means_and_the_spread_of_the_seeds(tmp_path):
    for seed, knn in enumerate([0.5, 0.6, 0.7]):
        (tmp_path / f"simclr-{seed}.json").write_text(json.dumps(record("simclr", seed, knn)))
    (tmp_path / "raw.json").write_text(json.dumps(record("raw pixels", 0, 0.55)))
    lines = learn.table(tmp_path).splitlines()
    assert lines[2].startswith("| raw pixels | 3 | 0.550 | 0.550-0.550 ")
    assert lines[3] == "| simclr | 3 | 0.600 | 0.500-0.700 | 0.500 | 0.250 | 10 | 3 |"


def test_students_are_compared_with_their_teacher(tmp_path):
    (tmp_path / "simclr-0.json").write_text(json.dumps(record("simclr", 0, 0.5)))
    (tmp_path / "alone-0.json").write_text(json.dumps(record(learn.ALONE, 0, 0.4)))
    assert len(learn.kept(tmp_path).splitlines()) == 2  # no student so far
    (tmp_path / "seed-0.json").write_text(json.dumps(record("seed", 0, 0.55) | {"teacher": 0.5}))
    assert [line.split(" | ")[:4:3] for line in learn.kept(tmp_path).splitlines()[2:]] == [
        ["| seed", "1.100"],
        ["| the teacher", "1.000"],
        [f"| {learn.ALONE}", "0.800"],
    ]


def test_the_page_names_the_machine_of_each_row(tmp_path):
    here, other = ({"processor": name, "torch": "2.14.1"} for name in ("A", "B"))
    for row, seed, where in (
        ("simclr", 0, here),
        ("swav", 0, here),
        ("moco", 0, here),
        ("moco", 1, other),
        ("byol", 0, other),
    ):
        (tmp_path / f"{row}-{seed}.json").write_text(json.dumps(record(row, seed, 0.5) | where))
    assert learn.origin(tmp_path).splitlines() == [
        "`python -m benchmarks.learn`, one thread a run, bf16-mixed. Processor: A, torch 2.14.1.",
        "B, torch 2.14.1: byol; moco (seed 1).",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triplet", "bind_modalities"])  # the images themselves, and a wrapper of them
def test_a_run_trains_and_judges_the_frozen_features(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["learn"])
    config = learn.settings_of(name, 0, 1, ["trainer.max_epochs=1", "model.init_args.warmup_epochs=0"], "32-true")
    config["trainer"]["limit_train_batches"] = 1
    found = learn.run(name, 0, config)
    assert found["epochs"] == 1
    assert all(0 < found[figure] <= 1 for figure in ("knn", "linear", "recall@1"))
    assert found["seconds"] > 0
