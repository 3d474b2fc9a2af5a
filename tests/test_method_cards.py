"""Each method has a card in ``docs/methods`` with all sections, whose picture and names are those of the code."""

import ast
import functools
import inspect
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest

import lightning_contrast as lc
from docs_flow import INPUTS, STEPS, flow_figure, parse_flow
from lightning_contrast.cli.method_cards import method_cards
from tests.methods.cases import make

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
CARDS = method_cards()
SECTIONS = ["Data flow", "Equation", "Source and differences", "Defaults", "Pitfalls", "Recipes", "Measured"]
NO_MODULES = {"teacher"}  # `Distill` keeps it out of its modules
OBJECTIVES = "lightning_contrast.nn.distillation_objectives"
LOSS_TABLES = {"Distill": OBJECTIVES, "SEED": OBJECTIVES, "PairContrast": "lightning_contrast.losses.pair_losses"}
PLAIN_LOSSES = ("nt_xent", "info_nce", "dense_info_nce", "sup_con", "alignment", "uniformity", "negative_cosine")
PLAIN_LOSSES += ("view_invariance",)
OTHER_LOSSES = {"NPID": {"info_nce"}, "CPC": {"cpc_sampled_loss"}, "TemporalCPC": {"cpc_all_times_loss"}}  # by argument


@pytest.fixture
def hooks():
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    import docs_hooks

    return docs_hooks


@pytest.fixture(params=CARDS)
def card(request, hooks):
    """Return the sections of one card, with the name of its method."""
    sections = hooks.card_sections((FOLDER / f"{request.param}.md").read_text())
    return SimpleNamespace(name=request.param, **{key.lower(): text for key, text in sections.items()})


def sources(name):
    """Return the text of a method's page, of the bases of the package that it has, and of its table of losses."""
    classes = [base for base in getattr(lc, name).__mro__ if base.__module__.startswith("lightning_contrast.")]
    modules = [sys.modules[base.__module__] for base in classes]
    modules += [sys.modules[LOSS_TABLES[name]]] if name in LOSS_TABLES else []
    return "\n".join(map(inspect.getsource, modules))


def used(source):
    """Return the names that a source uses, not those that it only imports."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}


@functools.cache
def built(name):
    """Return a small module of a method."""
    return make(name)


def test_every_method_has_a_card_and_every_card_a_method():
    assert {path.stem for path in FOLDER.glob("*.md")} == set(CARDS)
    assert set(CARDS) == {name for name in lc.methods.__all__ if name != "SelfSupervisedModule"}
    assert [name for name, one in CARDS.items() if not one.arguments or not one.source] == []


def test_a_card_has_all_sections(card):
    assert list(vars(card)) == ["name", "title", "idea", "flow", "equation", "defaults", "pitfalls"]
    assert card.title == card.name
    assert len(re.findall(r"[.?!](?=\s|$)", card.idea)) == 3, "the idea has three sentences"
    assert card.defaults.strip()
    pitfalls = re.split(r"(?m)^- ", card.pitfalls)
    assert pitfalls[0] == ""
    assert 1 <= len(pitfalls[1:]) <= 3
    assert all(len(one.split()) > 3 for one in pitfalls[1:])
    bullets = re.findall(r"(?m)^- (.*)", card.idea + "\n" + card.equation)
    assert bullets == [], "a line that begins with a minus became a list"


def test_the_page_has_all_headings(card, hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=f"methods/{card.name}.md"))
    text = (FOLDER / f"{card.name}.md").read_text()
    completed = hooks.on_page_markdown(text, page=page, config=None, files=None)
    assert re.findall(r"(?m)^## (.*)", completed) == SECTIONS
    assert completed.count("<svg") == 1
    assert completed.count("<math") == len(re.findall(r"(?m)^```math", text)) >= 1
    assert "```math" not in completed
    other = SimpleNamespace(file=SimpleNamespace(src_uri="concepts.md"))
    assert hooks.on_page_markdown("text", page=other, config=None, files=None) == "text"


def test_equations_are_understood(card, hooks):
    """A command that the converter does not know stays in its text with the backslash."""
    for formula in re.findall(r"(?ms)^```math\n(.*?)\n```", card.equation):
        found = ET.fromstring(hooks.convert(formula, display="block"))
        assert "\\" not in "".join(found.itertext()), formula


def test_the_picture_is_that_of_the_code(card):
    """Its networks, queues and parameters are all that the method has; its averages are those that are updated."""
    module, flow = built(card.name), parse_flow(card.flow)
    names = [name for box in flow.boxes for name in box.names]
    losses = [name for name in names if hasattr(lc.losses, name)]
    drawn = {name for name in names if name not in (*INPUTS, *STEPS, *losses)}
    assert all(hasattr(module, name) for name in drawn), drawn
    state = {name for name, child in module.named_children() if child.state_dict()}
    assert drawn - NO_MODULES == state
    children = {id(child): name for name, child in module.named_children()}
    pairs = module.momentum_pairs() if hasattr(module, "momentum_pairs") else []
    updated = {(children[id(online)], children[id(average)]) for online, average in pairs}
    assert {pair for a, b in flow.averages for pair in zip(a.names, b.names, strict=True)} == updated
    last = [name for box in flow.boxes if box.row == flow.rows - 1 for name in box.names]
    assert all(name in losses for name in last) or last == ["cross-entropy"]
    mine = used(sources(card.name))
    inside = {one for name in last if name in losses for one in used(inspect.getsource(getattr(lc.losses, name)))}
    assert all(name in mine or (name in inside and name not in last) for name in losses)
    public = {
        name for name in lc.losses.__all__ if name.endswith("_loss") or name in (*PLAIN_LOSSES, "view_invariance")
    }
    page = used(inspect.getsource(sys.modules[getattr(lc, card.name).__module__]))
    assert page & public - OTHER_LOSSES.get(card.name, set()) <= set(losses)


def known(name):
    """Return the names that a card may mention: arguments, attributes, public names, and arguments of the Trainer."""
    cls, module = getattr(lc, name), built(name)
    functions = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base)]
    functions += [L.Trainer.__init__]
    found = {parameter for function in functions for parameter in inspect.signature(function).parameters}
    packages = [lc, *(getattr(lc, package) for package in lc.__all__ if package.islower())]
    public = {one for package in packages for one in getattr(package, "__all__", [])}
    return found | public | set(dir(module)) | {"locations"}  # an option of all policies


def test_names_in_the_text_exist(card):
    allowed, source = known(card.name), sources(card.name)
    text = re.sub(r"(?ms)^```.*?^```", "", "\n".join([card.idea, card.equation, card.defaults, card.pitfalls]))
    for mention in re.findall(r"`([^`]+)`", text):
        if mention.startswith("train/"):
            key = mention.removeprefix("train/")
            assert f"train/{key}" in source or f'"{key}"' in source or key in dir(lc.metrics), mention
            continue
        name = re.match(r"[\w.]+", mention)[0]
        assert all(part in allowed for part in name.split(".")), mention


FLOW = """
view 1 | view 2 |
backbone | momentum_backbone |
projector: q | momentum_projector |
| stop | > queue
info_nce
# A caption.
"""


def test_a_flow_becomes_a_picture():
    flow = parse_flow(FLOW)
    assert (flow.lanes, flow.rows, flow.caption) == (3, 5, "A caption.")
    assert [box.names[0] for box, _ in flow.averages] == ["backbone", "projector"]
    assert flow.stops == {(3, 1)}
    last = flow.boxes[-1]
    assert (last.text, last.first, last.last) == ("info_nce", 0, 2)
    figure = flow_figure(FLOW, lambda name: name == "info_nce")
    svg = ET.fromstring(re.search(r"<svg.*</svg>", figure)[0])
    kinds = [rect.get("class") for rect in svg.iter("rect")]
    assert kinds == ["input", "input", "module", "average", "module", "average", "module", "loss"]
    paths = [path.get("class") for path in svg.iter("path")]
    assert (paths.count("ema"), paths.count("stop"), paths.count("arrow")) == (2, 1, 3 + 3 + 1 + 1)
    assert "A caption. Dashed arrow: moving average of the weights. Double bar: no gradient." in figure
    assert svg.get("aria-label").startswith("view 1 and view 2; then backbone and momentum_backbone; then projector")


def test_equal_neighbors_are_one_wide_box():
    boxes = parse_flow("a | b | c\nx | x | y\nz").boxes
    assert [(box.text, box.first, box.last) for box in boxes[3:]] == [("x", 0, 1), ("y", 2, 2), ("z", 0, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1 to 3 lanes"),
        ("a | b | c | d", "1 to 3 lanes"),
        ("a | b | c\nd | e", "one cell or all"),
        ("a >> b", "a cell is"),
        ("a | b | momentumprojector", "longer than"),
    ],
)
def test_bad_flows_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        flow_figure(text, lambda name: False)
