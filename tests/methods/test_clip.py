"""CLIP and SigLIP: texts, the learned scale, locked towers, parameter groups, chunks, open_clip's models, export."""

import copy
import json
import math
import warnings

import lightning as L
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import lightning_contrast as lc
from lightning_contrast.losses.image_text import naive_clip_loss, naive_siglip_loss
from lightning_contrast.methods.image_text import text_ids
from tests.methods.cases import TEXTS, TinyBackbone
from tests.methods.matrix_runs import run
from tests.methods.test_contract import gradients, run_step
from tests.tolerances import CANCELLING, FORMULA, NETWORK, assert_same_bits, f32, f64, near

WORDS = ["a red cat", "a dog", "a red cat", "the sun", "Öl", "two birds"]
both = pytest.mark.parametrize("method", [lc.CLIP, lc.SigLIP])


def make(method=lc.CLIP, **kwargs):
    torch.manual_seed(0)
    return method(TinyBackbone(), **({"warmup_epochs": 0} | TEXTS | {"context_length": 16} | kwargs))


def images(dtype=torch.float32):
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=dtype)


@both
@pytest.mark.parametrize("layout", ["tuple", "dict", "tokens", "labels first"])
def test_the_loss_is_the_formula_for_every_layout_of_the_batch(method, layout):
    module, pictures = make(method).double(), images(torch.float64)
    tokens = module.tokenizer(WORDS)
    batch = {
        "tuple": [pictures, WORDS],
        "dict": {"image": pictures, "text": WORDS, "index": torch.arange(6)},
        "tokens": (pictures, tokens),
        "labels first": (pictures, torch.arange(6), torch.arange(6), WORDS),
    }[layout]
    image, text = module.encode_image(pictures), module.encode_text(WORDS)
    if method is lc.CLIP:
        expected = naive_clip_loss(image, text, logit_scale=module.logit_scale())
    else:
        expected = naive_siglip_loss(image, text, logit_scale=module.logit_scale(), logit_bias=-10.0)
    out = run_step(module, batch)
    torch.testing.assert_close(out["loss"], expected, **f64(CANCELLING))
    torch.testing.assert_close(image.norm(dim=1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.equal(module(pictures), module.backbone(pictures))
    assert torch.equal(out["features"], module(pictures))


@both
def test_pairs_of_one_caption_or_one_index_are_no_negatives(method):
    pictures = images(torch.float64)
    index = torch.tensor([3, 1, 3, 0, 2, 5])  # the same groups as the captions
    of_text = run_step(make(method, mask_same="text").double(), [pictures, WORDS])["loss"]
    batch = {"image": pictures, "text": WORDS, "index": index}
    of_index = run_step(make(method, mask_same="index").double(), batch)["loss"]
    of_all = run_step(make(method).double(), batch)["loss"]
    assert of_text.item() == of_index.item()
    assert of_text.item() < of_all.item() - 1e-4
    with pytest.raises(ValueError, match="`batch` must hold sample indices for"):
        run_step(make(method, mask_same="index").double(), [pictures, WORDS])


def test_equal_texts_are_recognized_whatever_the_padding():
    tokenizer = lc.nn.ByteTokenizer(32)
    short, long = tokenizer(["a cat", "a dog"]), tokenizer(["a cat", "a much longer one"])
    ids, others = (text_ids(tokens) for tokens in (short, long))
    assert ids[0] == others[0]
    assert len({*ids.tolist(), *others.tolist()}) == 3
    assert min(ids.min(), others.min()) >= 0


@pytest.mark.parametrize("maximum", [15.0, None])
def test_the_scale_is_clamped_after_every_optimizer_step(maximum):
    module = make(max_logit_scale=maximum, optimizer="sgd", lr=50.0)
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(float(pl_module.logit_scale().detach()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(module, [[images(), WORDS]] * 4, [Watch()])
    assert len(seen) == 8
    inside = all(1 - 1e-3 <= scale <= 15 + 1e-3 for scale in seen)
    assert inside == (maximum is not None)


def test_a_locked_image_tower_does_not_change_and_its_projection_does():
    module = lc.CLIP(TinyBackbone(norm=True), locked_image=True, warmup_epochs=0, **TEXTS)
    before = copy.deepcopy(module.state_dict())
    assert module.training
    assert not any(part.training for part in module.backbone.modules())
    run(module, [[images(), torch.randint(1, 200, (6, 8))]] * 2)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("backbone.") for name in changed)
    assert {"image_projection.weight", "text_projection.weight", "logit_scale.log_scale"} <= changed
    assert all(not name.startswith("backbone.") for name, p in module.named_parameters() if p.requires_grad)
    held = {parameter for group in module.parameter_groups() for parameter in group["params"]}
    assert not held & set(module.backbone.parameters())


@pytest.mark.parametrize("other", [False, True])
def test_lightning_warns_of_eval_mode_only_where_it_was_not_asked_for(other):
    module = lc.CLIP(TinyBackbone(norm=True), locked_image=True, warmup_epochs=0, **TEXTS)
    if other:
        module.text_backbone.eval()
    loader = DataLoader([[images(), torch.randint(1, 200, (6, 8))]] * 2, batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        L.Trainer(max_steps=1, enable_model_summary=False, **quiet).fit(module, loader)
        left = [message.pattern for _, message, *_ in warnings.filters if message is not None]
    assert not any("in eval mode" in pattern for pattern in left)  # later fits of other modules warn
    assert any("in eval mode at the start of training" in str(warning.message) for warning in found) == other
    assert not module.backbone.training


def test_frozen_parts_stay_out_of_the_optimizer():
    module = make()
    module.text_backbone.token_embedding.requires_grad_(False)
    held = {id(p) for group in module.parameter_groups() for p in group["params"]}
    assert id(module.text_backbone.token_embedding.weight) not in held
    assert len(held) == len(list(module.parameters())) - 1


@both
def test_parameter_groups_are_the_published_ones(method):
    module = method("small_vit", backbone_kwargs={"depth": 1}, embedding_dim=8)
    decayed = {id(p) for g in module.parameter_groups() if g["weight_decay"] > 0 for p in g["params"]}
    names = {name: id(p) in decayed for name, p in module.named_parameters()}
    no_decay = [n for n, p in module.named_parameters() if p.ndim <= 1]
    no_decay += ["backbone.pos_embed", "backbone.cls_token", "text_backbone.positions"]
    assert {name for name, found in names.items() if not found} == set(no_decay)
    assert names["text_backbone.token_embedding.weight"]
    assert names["image_projection.weight"]
    assert names["text_projection.weight"]
    (scale,) = (g for g in module.parameter_groups() if "bounds" in g)
    assert scale["bounds"] == (0.0, math.log(100.0))
    betas = (0.9, 0.98) if method is lc.CLIP else (0.9, 0.95)
    assert all(group["betas"] == betas for group in module.parameter_groups())


def test_start_values_are_the_published_ones():
    tower = lc.nn.TextTransformer(1000, 77, 256, 4, 4, embedding_dim=64)
    residual, block = 256**-0.5 * 8**-0.5, tower.blocks[0]
    expected = {
        tower.token_embedding.weight: 0.02,
        tower.positions: 0.01,
        block.qkv.weight: 256**-0.5,
        block.out.weight: residual,
        block.mlp[0].weight: 512**-0.5,
        block.mlp[2].weight: residual,
        tower.projection.weight: 256**-0.5,
    }
    for weight, std in expected.items():
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.05)
    assert float(lc.SigLIP("small_convnet").logit_bias().detach()) == -10.0
    assert float(lc.CLIP("small_convnet").logit_scale().detach()) == near(1 / 0.07)


def test_padding_and_later_tokens_do_not_change_a_text():
    module = make().double()
    alone = torch.cat([module.encode_text([word]) for word in WORDS])
    torch.testing.assert_close(module.encode_text(WORDS), alone, **f64(CANCELLING))
    states, lengths = module.text_backbone.forward_tokens(module.tokenizer(WORDS))
    assert lengths.tolist() == [len(word.encode()) + 2 for word in WORDS]
    last = states[torch.arange(6), lengths - 1]
    torch.testing.assert_close(last, module.text_backbone(module.tokenizer(WORDS)), **f64(CANCELLING))


@both
@pytest.mark.parametrize("chunk", [1, 4])
def test_the_gradient_cache_is_exact_over_both_towers(method, chunk):
    module, sizes = make(method).double(), {"backbone": [], "text_backbone": []}
    batch = [images(torch.float64), WORDS]
    whole = gradients(module, batch)
    module.zero_grad()
    for name, seen in sizes.items():
        first = next(m for m in getattr(module, name).modules() if isinstance(m, nn.Conv2d | nn.Embedding))
        first.register_forward_hook(lambda m, args, out, seen=seen: seen.append(len(args[0])))
    cache = lc.GradientCache(chunk)
    cache.on_fit_start(None, module)
    chunked = gradients(module, batch)
    cache.teardown(None, module, "fit")
    assert whole.keys() == chunked.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(chunked[name], gradient, **f64(CANCELLING))
    assert {name: max(seen) for name, seen in sizes.items()} == {"backbone": chunk, "text_backbone": chunk}
    assert "forward" not in module.text_backbone.__dict__


BAD = {
    "unequal": (lambda m: run_step(m, [images(), WORDS[:5]]), ValueError, "`texts` must be 6, one for each image, got"),
    "no texts": (lambda m: run_step(m, [images(), torch.arange(6)]), ValueError, "`batch` must hold texts for CLIP"),
    "numbers": (lambda m: m.encode_text([1, 2]), TypeError, "`texts` must be a list of str, got 'a list with int'"),
    "a str": (lambda m: m.encode_text("a cat"), TypeError, "`texts` must be a list of str, got 'str'"),
    "empty": (lambda m: m.encode_text(["a", " ", ""]), ValueError, r"must not be empty, got 'empty texts at \[1, 2\]'"),
    "none": (lambda m: m.encode_text([]), ValueError, "must not be empty, got 'no texts'"),
    "long": (lambda m: m.encode_text(torch.ones(2, 17, dtype=torch.long)), ValueError, r"\(B, L\) with L <= 16"),
    "floats": (
        lambda m: run_step(m, {"image": images(), "text": torch.rand(6, 4)}),
        TypeError,
        "must be a list of str or int64 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_texts_are_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(make())


REFUSED = {
    "scale": ({"logit_scale": 200.0}, ValueError, r"`logit_scale` must lie in \[1, 100.0\]"),
    "log scale": ({"logit_scale": -2.6}, ValueError, "`logit_scale` must be > 0"),
    "mask": ({"mask_same": "color"}, ValueError, "`mask_same` must be one of"),
    "width": ({"embedding_dim": 0}, ValueError, "`embedding_dim` must be >= 1"),
    "tokenizer": ({"tokenizer": 3}, TypeError, "`tokenizer` must be callable"),
    "tokenizer name": ({"tokenizer": "ViT-B-33"}, ValueError, "`tokenizer` must be one of .* got 'ViT-B-33'"),
    "vocabulary": ({"tokenizer": lambda texts: None}, ValueError, "must have a `vocab_size`"),
    "heads": ({"text_kwargs": {"width": 10, "heads": 4}}, ValueError, "`width` must be a multiple of heads=4"),
    "both": ({"text_backbone": nn.Identity()}, ValueError, "`text_kwargs` must be None where"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused(case):
    arguments, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make(**arguments)


def test_long_texts_are_cut_with_one_warning_that_counts_them():
    module = make()
    with pytest.warns(UserWarning, match=r"2 of 3 texts are longer than 16 tokens and were cut"):
        module.encode_text(["a" * 15, "b" * 14, "é" * 8])
    tokens = module.tokenize(["c" * 40])  # a second warning would be an error
    assert module.tokenizer.cut == 3
    assert tokens.shape == (1, 16)
    assert tokens[0, -1] == 258


FILES = {"weights": "weights.pt", "training": "epoch_3.pt", "safetensors": "open_clip_model.safetensors"}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


KINDS = {
    "tiny-clip": (lc.CLIP, {}),
    "tiny-sigmoid": (lc.SigLIP, {"init_logit_bias": -10, "custom_text": True}),
    "tiny-quick": (lc.CLIP, {"quick_gelu": True}),
    "tiny-pooled": (lc.CLIP, {"vision_cfg": OPEN_CLIP["vision_cfg"] | {"pool_type": "avg", "layers": 3}}),
}


@pytest.fixture
def tiny_open_clip(tmp_path):
    """Return open_clip's module, which knows the configurations of `KINDS`."""
    open_clip = pytest.importorskip("open_clip")
    for name, (_, more) in KINDS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(OPEN_CLIP | more))
    open_clip.add_model_config(tmp_path)
    return open_clip


def write_weights(model, kind, path):
    """Write the weights of an open_clip model as its users, its training program or its publishing program do."""
    weights = model.state_dict()
    if kind == "training":
        weights = {f"module.{name}": value for name, value in weights.items()}  # of DistributedDataParallel
        torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": {}}, path)
    elif kind == "safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    else:
        torch.save(weights, path)


@pytest.mark.parametrize(
    ("name", "file"), [*((name, None) for name in KINDS)] + [(n, f) for n in list(KINDS)[:2] for f in FILES]
)
def test_open_clips_models_give_their_own_logits(name, file, tiny_open_clip, tmp_path):
    method, _ = KINDS[name]
    torch.manual_seed(3)
    theirs, pretrained = tiny_open_clip.create_model(name).eval(), None
    if file is not None:
        pretrained = str(tmp_path / FILES[file])
        write_weights(theirs, file, pretrained)
    torch.manual_seed(3 if file is None else 4)
    module = method.from_open_clip(name, pretrained, lr=1e-4).eval()
    pictures, tokens = torch.rand(6, 3, 32, 32), tiny_open_clip.get_tokenizer(name)(WORDS)
    for dtype, bounds in ((torch.float32, f32(FORMULA)), (torch.float64, f64(FORMULA))):  # 1e-5 and 1e-14
        ours, reference = module.to(dtype), theirs.to(dtype)
        with torch.no_grad():
            expected, _ = reference.get_logits(pictures.to(dtype), tokens)
            found = ours.logit_scale() * ours.encode_image(pictures.to(dtype)) @ ours.encode_text(WORDS).T
            found = found + ours.logit_bias() if method is lc.SigLIP else found
        assert expected.std() > 1e-3
        torch.testing.assert_close(found, expected, **bounds)
    module.float()
    assert module(pictures).shape == (6, 64)
    assert module.feature_dim == 64
    decayed = {id(p) for g in module.parameter_groups() for p in g["params"] if g["weight_decay"] > 0}
    tables = {name for name, p in module.named_parameters() if p.ndim > 1 and id(p) not in decayed}
    assert tables == {"backbone.positional_embedding", "text_backbone.positional_embedding"}
    run_step(module.train(), [pictures, WORDS])["loss"].backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.slow
def test_a_checkpoint_of_an_open_clip_model_is_loaded_into_another(tiny_open_clip, tmp_path):
    module = lc.CLIP.from_open_clip("tiny-clip", lr=1e-2, warmup_epochs=0)
    trainer = run(module, [[torch.rand(6, 3, 32, 32), WORDS]] * 2)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = lc.CLIP.from_open_clip("tiny-clip")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    again.load_state_dict(saved)
    loaded = lc.CLIP.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert loaded.hparams["lr"] == 1e-2
    for model in (again, loaded):
        assert_same_bits(model.eval().encode_text(WORDS), module.eval().encode_text(WORDS))
        images = torch.rand(2, 3, 32, 32)
        assert_same_bits(model.encode_image(images), module.encode_image(images))
    trainer = run(loaded, [[torch.rand(6, 3, 32, 32), WORDS]])  # its own checkpoint loads as well
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    lc.CLIP.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)


@pytest.mark.slow
def test_a_checkpoint_of_open_clips_sigmoid_model_keeps_scale_and_bias(tiny_open_clip, tmp_path):
    module = lc.SigLIP.from_open_clip("tiny-sigmoid", logit_bias=-7.0, lr=1e-3)
    run(module, [[torch.rand(6, 3, 32, 32), WORDS]]).save_checkpoint(tmp_path / "one.ckpt")
    loaded = lc.SigLIP.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    assert loaded.hparams["logit_bias"] == -7.0
    assert_same_bits(loaded.logit_scale(), module.logit_scale())
    assert_same_bits(loaded.logit_bias(), module.logit_bias())


def test_a_recipe_names_open_clips_towers(tiny_open_clip):
    module = lc.CLIP("open_clip:tiny-clip", lr=1e-3)
    assert module.encode_text(WORDS).shape == (len(WORDS), 24)
    with pytest.raises(ValueError, match="`text_kwargs` must be None with the towers of open_clip"):
        lc.CLIP("open_clip:tiny-clip", text_kwargs={"width": 64})


def test_a_method_without_a_bias_refuses_a_model_with_one(tiny_open_clip):
    with pytest.raises(ValueError, match=r"`name` must be a model without `logit_bias`, got 'tiny-sigmoid'\. Use"):
        lc.CLIP.from_open_clip("tiny-sigmoid")
    with pytest.raises(ValueError, match="`name` must be one of"):
        lc.CLIP.from_open_clip("tiny")
    module = lc.SigLIP.from_open_clip("tiny-clip", logit_bias=-5.0)
    assert float(module.logit_bias().detach()) == -5.0


def test_the_texts_of_an_open_clip_model_are_checked_and_counted(tiny_open_clip):
    module = lc.CLIP.from_open_clip("tiny-clip")
    fits, long = "a " * 75, "a " * 76  # with start and end 77 and 78 tokens
    module.encode_text(["a", fits])  # a warning would be an error
    with pytest.warns(UserWarning, match=r"2 of 4 texts are longer than 77 tokens and were cut"):
        module.encode_text([long, "a", fits, 3 * long])
    module.encode_text([long])
    assert module.tokenizer.cut == 3
    with pytest.raises(ValueError, match="`texts` must not be empty"):
        module.encode_text(["a", " "])
    with pytest.raises(TypeError, match="`texts` must be a list of str"):
        module.tokenizer("a cat")


def exported(path, given):
    """Return the embeddings that a graph gives."""
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(["embeddings"], {session.get_inputs()[0].name: given.numpy()})
    return torch.from_numpy(found)


@both
@pytest.mark.slow
def test_both_towers_are_exported(method, tmp_path):
    module = make(method).eval()
    paths = lc.export.export_towers(module, tmp_path, input_spec={"size": 16, "mean": None, "std": None})
    pictures, tokens = images(), module.tokenizer(WORDS)
    with torch.no_grad():
        expected = module.encode_image(pictures), module.encode_text(tokens)
    for path, given, embeddings in zip(paths, (pictures, tokens), expected, strict=True):
        torch.testing.assert_close(exported(path, given), embeddings, **f32(FORMULA))  # 1e-5
    assert tokens.shape[1] < module.text_backbone.context_length


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_open_clips_towers_are_exported(name, tiny_open_clip, tmp_path):
    module = KINDS[name][0].from_open_clip(name).eval()
    paths = lc.export.export_towers(module, tmp_path, input_spec={"size": 32, "mean": None, "std": None})
    pictures, tokens = torch.rand(6, 3, 32, 32), module.tokenizer(WORDS)
    with torch.no_grad():
        expected = [module.encode_image(pictures), module.encode_text(WORDS)]
    for path, given, embeddings in zip(paths, (pictures, tokens), expected, strict=True):
        torch.testing.assert_close(
            exported(path, given), embeddings, **f32(NETWORK)
        )  # 1.2e-4; `export_towers` checks 1e-4


def test_what_has_no_towers_or_sizes_is_not_exported(tmp_path):
    spec = {"size": 16, "mean": None, "std": None}
    with pytest.raises(TypeError, match="`model` must be an image-text model"):
        lc.export.export_towers(nn.Linear(2, 2), tmp_path, input_spec=spec)
    tower = lc.nn.NGramTower(width=16)
    module = lc.CLIP(TinyBackbone(), tower, tokenizer=lc.nn.NGramTokenizer())
    with pytest.raises(TypeError, match="`text_backbone` must have an int `context_length`, got 'NGramTower'"):
        lc.export.export_towers(module, tmp_path, input_spec=spec)
