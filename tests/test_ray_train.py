"""Training on a Ray cluster by Ray Train's Lightning strategies: two local workers give the run of DDP."""

import pytest
import torch

from tests.launch import run_processes
from tests.tolerances import TRAINING, f32


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.filterwarnings("ignore")  # of Ray's and Lightning's own
def test_two_ray_workers_give_the_run_of_ddp(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def fit(path, **settings):  # pickled by value, since the workers cannot import tests
        import lightning as L

        import lightning_contrast as lc

        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = lc.SimCLR("small_convnet", backbone_kwargs={"width": 4}, warmup_epochs=0, lr=0.1, optimizer="sgd")
        trainer = L.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[lc.StepSeed(0), lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))],
            **settings,
        )
        trainer.fit(model, lc.data.EmojiDataModule(batch_size=16))
        if trainer.is_global_zero:
            torch.save({"world": trainer.world_size, **model.backbone.state_dict()}, path)

    def loop(config):
        from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

        fit(config["path"], devices="auto", strategy=RayDDPStrategy(), plugins=[RayLightningEnvironment()])

    def run(rank):
        fit(tmp_path / "ddp.pt", devices=2, strategy="ddp")

    run_processes(run, 2)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else other tests starve them
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5})
        storage = RunConfig(storage_path=str(tmp_path / "ray"))
        config = {"path": str(tmp_path / "ray.pt")}
        TorchTrainer(loop, train_loop_config=config, scaling_config=scaling, run_config=storage).fit()
    finally:
        ray.shutdown()
    expected, found = (torch.load(tmp_path / name, weights_only=True) for name in ("ddp.pt", "ray.pt"))
    assert expected["world"] == found["world"] == 2
    torch.testing.assert_close(found, expected, **f32(TRAINING))
