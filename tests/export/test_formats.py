"""Formats of `export` other than plain weights and graphs: timm, torch.export, pixels in, int8, int4, pruning."""

import json
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import lightning_contrast as lc
from lightning_contrast.export import export, int8, load_backbone, parity, prune_channels, read_report
from lightning_contrast.export.graphs import write_onnx
from lightning_contrast.export.parity import check_parity, compare
from lightning_contrast.export.samples import Samples, read_samples
from lightning_contrast.export.source import model_digest
from tests.tolerances import FORMULA, NETWORK, f32, near

SPEC = {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]}
BICUBIC = SPEC | {"interpolation": "bicubic"}


def images(count, seed=0, size=16):
    """Return uint8 images of smooth patches; their classes are the colors."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    small = torch.rand(count, 3, 4, 4, generator=generator)
    small[torch.arange(count), labels] += 1
    pixels = nn.functional.interpolate(small / 2, size, mode="bilinear")
    return (pixels * 255).to(torch.uint8), labels


def loader(count=96, **options):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images(count, **options)), batch_size=20)


def settled(network):
    """Return a network whose BatchNorm has the averages of some images, and whose weights are no zeros."""
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network((torch.rand(16, 3, 16, 16) - 0.4) / 0.25)
    return network.eval()


def convnet():
    torch.manual_seed(0)
    return settled(lc.nn.build_backbone("small_convnet", backbone_kwargs={"width": 8}).module)


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "depth": 2} | options
    network = lc.nn.build_backbone("test_vit", backbone_kwargs=settings).module.eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(3 if weight.ndim > 1 else 1)  # logits of the attention that are not all 0
    return network


def normalized(pixels):
    mean, std = (torch.tensor(SPEC[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def run(path, given):
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    return torch.from_numpy(found)


def test_timm_loads_a_folder_strictly_and_prepares_images_alike(tmp_path):
    network = vit()
    path = export(lc.SimCLR(network), tmp_path / "vit", format="timm", input_spec=BICUBIC)
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors", "README.md", "parity.json"}
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    given = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(loaded(given), network(given), **f32(NETWORK))
    config = timm.data.resolve_model_data_config(loaded)
    found = (config["input_size"], list(config["mean"]), list(config["std"]), config["interpolation"])
    assert (*found, config["crop_pct"]) == ((3, 16, 16), SPEC["mean"], SPEC["std"], "bicubic", 1.0)
    card = (path / "README.md").read_text()
    assert "library_name: timm" in card
    assert f"p1 {read_report(path).cosine_p1:.6f}" in card


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (convnet, {}, "`model` must be a network of timm, got 'SmallConvNet'"),
        (vit, {"input_spec": SPEC | {"scale": [0, 9]}}, "`input_spec` must hold only size, mean and std"),
        (vit, {"preprocess": True}, "`preprocess` must be False for format='timm'"),
        (
            lambda: lc.SimCLR("resnet10t", small_images=True),
            {},
            "by its name alone, got .*small_images",
        ),
        (lambda: timm.create_model("test_vit", num_classes=0, img_size=16, depth=3), {}, "its name and arguments"),
    ],
)
def test_what_timm_would_not_build_is_refused(tmp_path, network, options, message):
    with pytest.raises(ValueError, match=message):
        export(network(), tmp_path / "net", format="timm", **{"input_spec": SPEC} | options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_program_runs_for_any_batch_and_carries_the_input(tmp_path):
    network = convnet()
    path = export(network, tmp_path / "net.pt2", format="torch_export", input_spec=SPEC)
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for count in (1, 5):
        given = torch.rand(count, 3, 16, 16)
        torch.testing.assert_close(program(given), network(given), **f32(NETWORK))
    assert json.loads(json.loads(extra["metadata.json"])["input_spec"]) == SPEC


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.slow
def test_pixels_in_give_the_features_of_prepared_images(tmp_path, format):
    network, (pixels, _) = convnet(), images(5)
    path = export(network, tmp_path / "net", format=format, input_spec=SPEC, preprocess=True)
    found = run(path, pixels) if format == "onnx" else torch.export.load(path).module()(pixels)
    torch.testing.assert_close(found, network(normalized(pixels)), **f32(NETWORK))


@pytest.mark.slow
def test_pixels_in_follow_scale_window_and_indices(tmp_path):
    spec = {"size": 16, "mean": [0.5] * 4, "std": [0.2] * 4, "scale": [10, 210], "window": [0.1, 0.8]}
    spec["indices"] = [[1, 0]]
    network = settled_with_four_channels()
    path = export(network, tmp_path / "net.onnx", format="onnx", input_spec=spec, preprocess=True)
    pixels, _ = images(4)
    policy = lc.augment.ViewPolicy.from_input_spec(spec)
    torch.testing.assert_close(run(path, pixels), network(policy.eval_transform(pixels)), **f32(NETWORK))
    with pytest.raises(ValueError, match="`preprocess` must be False for values beyond uint8"):
        export(network, tmp_path / "b.onnx", format="onnx", input_spec=spec | {"scale": [0, 999]}, preprocess=True)


def settled_with_four_channels():
    torch.manual_seed(0)
    return lc.nn.build_backbone("small_convnet", backbone_kwargs={"in_chans": 4, "width": 4}).module.eval()


@pytest.mark.slow
def test_the_metadata_say_what_the_file_is(tmp_path):
    other = convnet()
    with torch.no_grad():
        other.stem[0].weight[0, 0, 0, 0] += 1
    options = {"format": "onnx", "input_spec": BICUBIC}
    found = [
        onnxruntime.InferenceSession(export(net, tmp_path / "a.onnx", **options)).get_modelmeta().custom_metadata_map
        for net in (convnet(), other)
    ]
    preparation = {**SPEC, "scale": None, "interpolation": "bicubic", "inside": False}
    assert json.loads(found[0]["preprocessing"]) == preparation
    assert (found[0]["embedding_dim"], found[0]["format"]) == ("64", "onnx")
    assert found[0]["package_version"] == lc.__version__
    assert found[0]["model_digest"] != found[1]["model_digest"]
    digest = lc.nn.frozen_teacher.weights_digest(convnet())
    assert found[0]["model_digest"] == f"{digest:016x}-onnx"


def types_with_int8_inputs(path):
    """Return the kinds of nodes that read what a DequantizeLinear node gives."""
    model = onnx.load(path)
    made = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    readers = [node for node in model.graph.node if node.op_type != "QuantizeLinear"]
    return {node.op_type for node in readers if made & set(node.input)}


@pytest.mark.slow
def test_activations_are_uint8_for_which_the_runtime_has_fast_kernels(tmp_path):
    path = export(convnet(), tmp_path / "net.onnx", format="onnx-int8", input_spec=SPEC, data=loader(), tolerance=0.05)
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = {types[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert found == {onnx.TensorProto.UINT8}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert kinds.count("QLinearConv") == 4


@pytest.mark.slow
def test_int8_of_a_convnet_is_small_and_close(tmp_path):
    network = settled(lc.nn.build_backbone("small_convnet").module)
    data = loader()
    path = export(network, tmp_path / "net.onnx", format="onnx-int8", input_spec=SPEC, data=data, calibration_images=32)
    report = read_report(path)
    assert "Conv" in report.quantized
    assert "Conv" in types_with_int8_inputs(path)
    assert report.images == 64  # those of the calibration are not compared
    assert report.cosine_p1 >= 0.99
    assert report.bytes_after < 0.4 * report.bytes_before
    assert report.knn_after >= report.knn_before - 0.01
    pixels, _ = images(96)
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(run(path, normalized(pixels)), network(normalized(pixels)))
    assert 0.99 <= float(cosine.min()) < 1
    kept = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert kept["format"] == "onnx-int8"
    assert json.loads(kept["input_spec"]) == SPEC
    assert kept["model_digest"].endswith("onnx-int8")


@pytest.mark.parametrize(("tolerance", "graphs"), [(0.05, 1), (1e-9, 4)])
@pytest.mark.slow
def test_kinds_are_quantized_alone_only_if_all_together_cost_too_much(tmp_path, monkeypatch, tolerance, graphs):
    made, static = [], int8._static
    monkeypatch.setattr(int8, "_static", lambda *args: made.append(args[3]) or static(*args))
    torch.manual_seed(0)
    inputs = torch.randn(24, 3, 16, 16)
    write_onnx(convnet(), inputs[:2], tmp_path / "net.onnx", ("images", "features"))
    options = {"folder": tmp_path, "tolerance": tolerance}
    if tolerance > 0.01:
        found = int8.quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", inputs, **options)
        assert "Conv" in found.kinds
        assert found.left_in_float == {}
    else:
        with pytest.raises(RuntimeError, match="No operator can be quantized"):  # Relu alone leaves all in float
            int8.quantize(tmp_path / "net.onnx", tmp_path / "int8.onnx", inputs, **options)
    assert len(made) == graphs


@pytest.mark.slow
def test_operators_that_lose_stay_in_float_and_are_named(tmp_path):
    network = vit(embed_dim=64, num_heads=4)
    options = {"format": "onnx-int8", "input_spec": SPEC, "data": loader(), "calibration_images": 32}
    path = export(network, tmp_path / "net.onnx", **options)
    report = read_report(path)
    assert "MatMul with weights" in report.quantized
    assert max(report.left_in_float["LayerNormalization"], report.left_in_float["Add"]) < 0.99
    assert report.cosine_p1 >= 0.995
    assert "LayerNormalization (p1 cosine 0.98" in str(report)
    found = types_with_int8_inputs(path)
    assert "MatMul" in found
    assert "LayerNormalization" not in found  # sums read what int8 products give


@pytest.mark.slow
def test_int8_without_a_way_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match=r"No operator can be quantized within `tolerance` 0.*Conv 0\.99"):
        export(
            convnet(), tmp_path / "n.onnx", format="onnx-int8", input_spec=SPEC, data=loader(), tolerance=0.0, images=16
        )
    with pytest.raises(ValueError, match="`data` must be given for format='onnx-int8'"):
        export(convnet(), tmp_path / "n.onnx", format="onnx-int8", input_spec=SPEC)
    with pytest.raises(ValueError, match="`data` must hold at least 16 images, got 15"):
        export(convnet(), tmp_path / "n.onnx", format="onnx-int8", input_spec=SPEC, data=images(15)[0])
    assert list(tmp_path.iterdir()) == []


def test_int4_halves_bytes_and_loads(tmp_path):
    pytest.importorskip("torchao")
    network = vit(embed_dim=64, num_heads=4)
    path = export(network, tmp_path / "vit.pt", format="int4", input_spec=SPEC, tolerance=0.1)
    loaded, report = load_backbone(path), read_report(path)
    weight = loaded.blocks[0].attn.qkv.weight
    groups = weight.view(len(weight), -1, 32)
    assert max(len(set(group.tolist())) for row in groups for group in row) <= 16
    assert not torch.equal(weight, network.blocks[0].attn.qkv.weight)
    error = (weight - network.blocks[0].attn.qkv.weight).abs().view_as(groups).amax(2)
    assert bool((error <= network.blocks[0].attn.qkv.weight.view_as(groups).abs().amax(2) / 7 + 1e-3).all())
    assert report.bytes_after < 0.5 * report.bytes_before
    assert 0.9 <= report.cosine_min < 0.9999
    assert "blocks.0.attn.qkv" in report.quantized
    with pytest.raises(RuntimeError, match="Missing key"):
        vit(embed_dim=64, num_heads=4).load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with pytest.raises(ValueError, match="have linear layers"):
        export(convnet(), tmp_path / "net.pt", format="int4", input_spec=SPEC)


def test_pruned_channels_are_zero_and_reported(tmp_path):
    network = convnet()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pruned = prune_channels(network, 0.25)
    convs = [module.weight for module in pruned.modules() if isinstance(module, nn.Conv2d)]
    assert [int((weight == 0).flatten(1).all(1).sum()) for weight in convs] == [2, 4, 8, 0]
    kept = convs[0].flatten(1).norm(dim=1)
    original = before["stem.0.weight"].flatten(1).norm(dim=1)
    assert set(kept.nonzero().flatten().tolist()) == set(original.argsort()[2:].tolist())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    path = export(network, tmp_path / "net.pt", input_spec=SPEC, prune=0.25, tolerance=0.9)
    zeros = sum(float((weight == 0).sum()) for weight in convs) / sum(weight.numel() for weight in convs)
    assert read_report(path).zeros == near(zeros)
    torch.testing.assert_close(load_backbone(path)(normalized(images(3)[0])), pruned(normalized(images(3)[0])))
    with pytest.raises(RuntimeError, match="the first percentile of the cosines is"):
        export(network, tmp_path / "more.pt", input_spec=SPEC, prune=0.75)
    assert not (tmp_path / "more.pt").exists()


def test_the_report_counts_what_it_says(tmp_path):
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    inputs = nn.functional.one_hot(labels, 2).float() + 0.01 * torch.rand(40, 2)
    network = nn.Linear(2, 2)

    def worse(given):
        found = network(given)
        return found + (given[:, 1:] > 0.5) * 0.5 * found.abs().amax(1, keepdim=True) * torch.tensor([1.0, -1.0])

    report = compare(
        "a",
        network,
        worse,
        Samples(inputs, labels, "40 rows"),
        tolerance=0.5,
        network=network,
        written=network,
        size=7,
    )
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(worse(inputs), network(inputs)).sort().values
        largest = (worse(inputs) - network(inputs)).abs().max() / network(inputs).abs().max()
    assert report.cosine_mean == near(float(cosine.mean()))
    assert report.cosine_min == near(float(cosine[0]))
    assert report.cosine_p1 == near(float(cosine[0] + 0.39 * (cosine[1] - cosine[0])))
    assert report.max_difference == near(float(largest))
    assert (report.knn_before, report.knn_queries, report.bytes_before, report.bytes_after) == (1.0, 20, 24, 7)
    check_parity(report, exact=False)
    with pytest.raises(RuntimeError, match="features differ from those of the model"):
        check_parity(report, exact=True)


def test_times_alternate_and_leave_the_first_call_out(monkeypatch):
    calls, clock = [], [0.0]

    def runner(name, seconds):
        def run(given):
            clock[0] += seconds if name in calls else 100.0
            calls.append(name)
            return given

        return run

    monkeypatch.setattr(parity, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = parity._milliseconds((runner("before", 4.0), runner("after", 2.0)), torch.rand(8, 3))
    assert found == [near(500.0), near(250.0)]
    assert calls == ["before", "after"] * 6


@pytest.mark.parametrize(("after", "passes"), [(0.95, True), (0.85, False)])
def test_a_fall_of_knn_is_refused_beyond_one_query(tmp_path, after, passes):
    path = export(convnet(), tmp_path / "net.pt", input_spec=SPEC, data=loader(40))
    report = read_report(path)
    changed = {**vars(report), "knn_before": 0.95 + 0.05, "knn_after": after, "knn_queries": 20}
    found = type(report)(**changed)
    if passes:
        check_parity(found, exact=True)
    else:
        with pytest.raises(RuntimeError, match=r"k-NN falls from 1\.0000 to 0\.8500"):
            check_parity(found, exact=True)


def test_data_are_prepared_by_the_spec_and_spread_over_the_set():
    pixels, labels = images(60, size=20)
    found = read_samples(loader(60, size=20), BICUBIC, channels=3, count=7)
    policy = lc.augment.ViewPolicy.from_input_spec(SPEC, interpolation="bicubic")
    rows = [i * 60 // 7 for i in range(7)]
    assert found.labels.tolist() == labels[rows].tolist()
    torch.testing.assert_close(found.inputs, policy.eval_transform(pixels[rows]), **f32(FORMULA))
    plain = lc.augment.ViewPolicy.from_input_spec(
        {"size": 16, "mean": None, "std": None}, interpolation="bicubic"
    ).eval_transform(pixels[rows])
    found = read_samples(loader(60, size=20), BICUBIC, channels=3, count=7, pixels=True)
    assert torch.equal(found.inputs, (plain * 255).round().to(torch.uint8))
    with pytest.raises(ValueError, match=r"`images` must lie in 0\.\.1"):
        read_samples(torch.randn(4, 3, 16, 16), SPEC, channels=3, count=4)
    with pytest.raises(TypeError, match="`data` must be a DataModule or a loader, got 'int'"):
        read_samples(3, SPEC, channels=3, count=4)


def test_a_report_is_required():
    with pytest.raises(FileNotFoundError, match="`path` must have a parity report"):
        read_report("nowhere.onnx")


def test_int8_graphs_of_other_calibrations_have_other_digests():
    network = convnet()
    inputs = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    digests = [
        model_digest(network, "onnx-int8", calibration, tolerance)
        for calibration, tolerance in ((inputs, 0.01), (inputs, 0.01), (1 - inputs, 0.01), (inputs, 0.02))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(("format", "is_folder"), [("state_dict", True), ("timm", False)])
def test_a_path_of_the_other_kind_is_refused_before_any_work(tmp_path, format, is_folder):
    path = tmp_path / "there"
    if is_folder:
        path.mkdir()
    else:
        path.write_text("")
    with pytest.raises(ValueError, match="`path` must be a f"):
        export(convnet(), path, format=format, input_spec=SPEC)
    assert [found.name for found in tmp_path.iterdir()] == ["there"]
