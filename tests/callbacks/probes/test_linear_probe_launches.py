"""The hooks of the linear probe launch few kernels per training step."""

from collections import Counter

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_contrast.callbacks import OnlineLinearProbe
from tests.callbacks.step_modules import fit

IMAGES, WIDTH, STEPS = 256, 96, 4

# Operations that change the metadata of a tensor, allocate memory without writing it, or only profile.
NO_KERNEL = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "slice", "select", "expand", "t", "transpose", "permute"),
    *("unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "as_strided", "detach", "alias", "is_same_size"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_record_function_enter_new", "_record_function_exit", "_local_scalar_dense"),
}


class Launches(TorchDispatchMode):
    """Counts the dispatched operations that would launch a kernel on an accelerator."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name not in NO_KERNEL:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


class Counted(OnlineLinearProbe):
    """Counts the launches of its hooks in each training step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.launches = []

    def on_train_batch_start(self, *args):
        with Launches() as launches:
            super().on_train_batch_start(*args)
        self.launches.append(launches.names)

    def on_train_batch_end(self, *args):
        with Launches() as launches:
            super().on_train_batch_end(*args)
        self.launches[-1] += launches.names


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch[0])
        return {"loss": features.square().mean(), "features": features.detach()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_step_launches_at_most_60_kernels():
    """On a CPU, where the values of each batch are checked too: an accelerator checks those of the first batch only."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS * IMAGES, WIDTH, generator=generator)
    labels = torch.randint(0, 10, (STEPS * IMAGES,), generator=generator)
    probe = Counted(10, labels=1)
    fit(Linear(), [probe], DataLoader(TensorDataset(images, labels), batch_size=IMAGES))
    _, *steps = probe.launches  # the first step creates the model
    assert len(steps) == STEPS - 1
    for step in steps:
        assert step["addmm"] == 1  # the model ran under the count
        assert step.total() <= 60, dict(step)
