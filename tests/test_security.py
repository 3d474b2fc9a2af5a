"""Files from others run no code: nothing is unpickled, evaluated or given to a shell; archives stay in their folder."""

import ast
import configparser
import os
import pickle
import re
import sys
import tarfile
from contextlib import suppress
from importlib.metadata import packages_distributions
from pathlib import Path

import lightning as L
import pytest
import torch

import lightning_contrast as lc
from lightning_contrast.checkpoints import AtomicCheckpointIO, check_checkpoint, load_checkpoint

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "lightning_contrast").rglob("*.py"))
PROGRAMS = [*PACKAGE, *sorted((ROOT / "examples").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
IDS = [str(path.relative_to(ROOT)) for path in PROGRAMS]

# ---------------------------------------------------------------------------------------------------- the source

FORBIDDEN = {
    "builtins": {"eval", "exec", "compile", "__import__"},
    "os": {"system", "popen", "execv", "execve", "execl", "execlp", "execvp", "spawnl", "spawnv", "startfile"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "pickle": {"load", "loads", "Unpickler"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "pandas": {"read_pickle"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"},
    "shutil": {"unpack_archive"},
    "tarfile": {"open", "TarFile"},
    "torchvision.datasets.utils": {"download_and_extract_archive", "extract_archive"},
    "torch.hub": {"load", "load_state_dict_from_url"},
    "torch.jit": {"load"},
}
ALLOWED = {
    # what a process that `run_processes` forked itself sends back through a pipe
    ("lightning_contrast/testing/processes.py", "pickle.loads"),
    # the headers and contents of a shard's files are read, nothing is unpacked
    ("lightning_contrast/data/shards.py", "tarfile.open"),
    ("lightning_contrast/data/shards.py", "tarfile.TarFile"),
    # an argument of the user's, True by default; the second loads what the kit itself has just written
    ("lightning_contrast/checkpoints.py", "torch.load without weights_only=True"),
    ("lightning_contrast/testing/resume.py", "torch.load without weights_only=True"),
}


def findings(source, name="x.py"):
    """Return what a source calls or names that could run code from a file."""
    tree = ast.parse(source)
    names = {forbidden: f"builtins.{forbidden}" for forbidden in FORBIDDEN["builtins"]}
    for node in ast.walk(tree):  # the module of each imported name
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                names[alias.asname or root] = alias.name if alias.asname else root
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full(node):
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return "?"

    def constant(call, argument):
        given = [keyword.value for keyword in call.keywords if keyword.arg == argument]
        return given[0].value if given and isinstance(given[0], ast.Constant) else (given[0] if given else None)

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            module, _, attribute = full(node).rpartition(".")
            if attribute in FORBIDDEN.get(module, ()):
                found.add(f"{module}.{attribute}")
        if isinstance(node, ast.Call):
            called = full(node.func)
            if called == "torch.load" and constant(node, "weights_only") is not True:
                found.add("torch.load without weights_only=True")
            if called == "numpy.load" and constant(node, "allow_pickle") not in (None, False):
                found.add("numpy.load with allow_pickle")
            if called.startswith("subprocess.") and constant(node, "shell") not in (None, False):
                found.add("subprocess with shell")
            if isinstance(node.func, ast.Attribute) and node.func.attr in ("extractall", "extract"):
                found.add("an archive that is unpacked")
    return {what for what in found if (name, what) not in ALLOWED}


@pytest.mark.parametrize("path", PROGRAMS, ids=IDS)
def test_no_program_of_ours_runs_what_a_file_says(path):
    assert findings(path.read_text(), str(path.relative_to(ROOT))) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("eval('1')", "builtins.eval"),
        ("exec(text)", "builtins.exec"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import system as s\ns('ls')", "os.system"),
        ("import subprocess as sp\nsp.run('ls', shell=True)", "subprocess with shell"),
        ("import subprocess\nsubprocess.run('ls', shell=flag)", "subprocess with shell"),
        ("import pickle\npickle.load(file)", "pickle.load"),
        ("from pickle import Unpickler\nclass U(Unpickler): pass", "pickle.Unpickler"),
        ("import yaml\nyaml.load(file, Loader=yaml.Loader)", "yaml.load"),
        ("from yaml import unsafe_load\nunsafe_load(file)", "yaml.unsafe_load"),
        ("import torch\ntorch.load(path)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(path, weights_only=flag)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load with allow_pickle"),
        ("archive.extractall(folder)", "an archive that is unpacked"),
    ],
)
def test_the_search_finds(source, found):
    assert findings(source) == {found}


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['ls'])",
        "import re\nre.compile('a')",
    ],
)
def test_the_search_leaves_alone(source):
    assert findings(source) == set()


# ---------------------------------------------------------------------------------------------------- dependencies

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")
FOREIGN = {"pytorch_lightning"}  # looked for in `sys.modules`, never needed


def declared():
    lines = CONFIG["options"]["install_requires"].splitlines()
    lines += [line for extra in CONFIG["options.extras_require"].values() for line in extra.splitlines()]
    return {re.split(r"[\[<>=~! ]", line.strip())[0].lower().replace("_", "-") for line in lines if line.strip()}


@pytest.mark.slow
def test_every_imported_package_is_declared():
    """Nothing is imported that setup.cfg does not name, so that nothing comes in by way of another package."""
    owners, missing, known = packages_distributions(), {}, declared()
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for root in {module.split(".")[0] for module in modules} - {"lightning_contrast"} - FOREIGN:
                if root in sys.stdlib_module_names:
                    continue
                packages = {name.lower().replace("_", "-") for name in owners.get(root, [root])}
                if not packages & known:
                    missing.setdefault(root, path.name)
    assert missing == {}


# ---------------------------------------------------------------------------------------------------- checkpoints


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The content of a checkpoint of a method."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = fit(small())
    trainer.save_checkpoint(folder / "whole.ckpt")
    return torch.load(folder / "whole.ckpt", weights_only=True)


@pytest.fixture(params=["checkpoint", "old format", "bare pickle"])
def trap(request, tmp_path, whole):
    """A checkpoint that makes a folder when it is unpickled, and that folder."""
    path, sprung = tmp_path / "trap.ckpt", tmp_path / "sprung"
    content = whole | {"extra": Payload(sprung)}
    if request.param == "bare pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=request.param == "checkpoint")
    return path, sprung


def fit(module, plugins=(), **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    views = lc.ViewAugmentation(lc.augment.simclr_cifar_views(32))
    trainer = L.Trainer(**quiet, **short, accelerator="cpu", callbacks=[views], plugins=list(plugins))
    trainer.fit(module, datamodule=lc.data.EmojiDataModule(8), **kwargs)
    return trainer


def validate(path):
    L.Trainer(logger=False, accelerator="cpu").validate(
        lc.SimCLR("small_convnet"), datamodule=lc.data.EmojiDataModule(8), ckpt_path=path
    )


def command_line(path):
    from lightning_contrast.cli import main

    arguments = ["--model=SimCLR", "--model.backbone=small_convnet", "--data=EmojiDataModule", "--trainer.logger=false"]
    main(["fit", *arguments, "--trainer.accelerator=cpu", "--seed_everything=0", f"--ckpt_path={path}"])


def small():
    return lc.SimCLR("small_convnet", warmup_epochs=0)


ENTRIES = {
    "check_checkpoint": check_checkpoint,
    "load_checkpoint": load_checkpoint,
    "AtomicCheckpointIO": AtomicCheckpointIO().load_checkpoint,
    "fit": lambda path: fit(small(), ckpt_path=path),
    "fit with AtomicCheckpointIO": lambda path: fit(small(), [AtomicCheckpointIO()], ckpt_path=path),
    "validate": validate,
    "load_from_checkpoint": lc.SimCLR.load_from_checkpoint,
    "extend_training": lambda path: lc.resuming.extend_training(path, 1),
    "from_pretrained_backbone": lambda path: lc.resuming.from_pretrained_backbone(small(), path),
    "command line": command_line,
}


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_malicious_checkpoint_is_refused(entry, trap, monkeypatch):
    path, sprung = trap
    monkeypatch.setattr("sys.argv", ["lightning_contrast"])
    with pytest.raises((pickle.UnpicklingError, ValueError)) as error:
        ENTRIES[entry](path)
    assert not sprung.exists(), "the payload ran"
    assert not isinstance(error.value, FileNotFoundError)


def test_the_trap_works(trap):
    """Without `weights_only=True` the payload does run: the test above can fail."""
    path, sprung = trap
    with suppress(RuntimeError):  # of the bare pickle, after it was unpickled
        torch.load(path, weights_only=False)
    assert sprung.is_dir()


def test_a_refusal_names_the_file_and_what_it_asks_for(tmp_path):
    path = tmp_path / "trap.ckpt"
    torch.save({"extra": Payload(tmp_path / "sprung")}, path)
    for read in (check_checkpoint, load_checkpoint):
        with pytest.raises(
            pickle.UnpicklingError, match=r"trap\.ckpt contains objects other than .*posix\.mkdir.*only if you trust"
        ):
            read(path)
    assert load_checkpoint(path, weights_only=False) == {"extra": None}  # the user's own word
    assert (tmp_path / "sprung").is_dir()


# ---------------------------------------------------------------------------------------------------- data


def test_a_changed_cifar_batch_is_not_unpickled(tmp_path):
    """Torchvision reads CIFAR with pickle, but only files of the published checksum."""
    folder, sprung = tmp_path / "cifar-10-batches-py", tmp_path / "sprung"
    folder.mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Payload(sprung)))
    with pytest.raises(FileNotFoundError, match="`root` must hold all of CIFAR10"):
        lc.data.ImageDataModule("CIFAR10", tmp_path).setup("fit")
    assert not sprung.exists()


def test_an_archive_of_another_checksum_is_not_unpacked(tmp_path, monkeypatch):
    """A mirror that sends another archive, with a member that climbs out of the folder, is refused before unpacking."""
    root, evil = tmp_path / "root", tmp_path / "evil.tar.gz"
    (tmp_path / "member").write_text("escaped")
    with tarfile.open(evil, "w:gz") as archive:
        archive.add(tmp_path / "member", arcname="../escaped")
    fetched = []

    def fetch(url, filename, *args, **kwargs):
        fetched.append(url)
        Path(filename).write_bytes(evil.read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    with pytest.raises(RuntimeError, match="corrupted"):
        lc.data.ImageDataModule("CIFAR10", root, download=True).prepare_data()
    assert fetched
    assert not (tmp_path / "escaped").exists()
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["cifar-10-python.tar.gz"]


def test_an_array_file_with_objects_is_refused(tmp_path):
    """The emoji are read with `np.load`, whose default refuses pickled objects."""
    import numpy as np

    np.savez(tmp_path / "trap.npz", noto=np.array([Payload(tmp_path / "sprung")], dtype=object))
    with np.load(tmp_path / "trap.npz") as arrays, pytest.raises(ValueError, match="allow_pickle=False"):
        arrays["noto"]
    assert not (tmp_path / "sprung").exists()
