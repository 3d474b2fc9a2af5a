"""Pages of the site that are made of other texts: a card per method, the callbacks, and the API reference.

mkdocs calls `on_config`, `on_files` and `on_page_markdown`, mkdocstrings `DocstringMarkdown`; see ``mkdocs.yml``. The
sources are the docstrings, the recipes, and the tables of the README and of ``docs/learn.md``: nothing is written
twice. What no docstring has room for is in ``docs/methods/NAME.md``: the idea of a method, its data flow, equation,
defaults and pitfalls.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from docs_flow import flow_figure
from lightning_contrast import losses
from lightning_contrast.cli.method_cards import MethodCard, method_cards

ROOT = Path(__file__).parent
_SOURCE = "https://github.com/lightning-contrast/lightning_contrast/blob/main/"


class DocstringMarkdown(griffe.Extension):
    """Read docstrings as they are meant: examples are code, and a text that begins with "> 0" is no quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename ``Example:``, since griffe knows ``Examples:`` only, and escape comparisons."""
        if obj.docstring is not None:
            text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)^( *(?:\w+: )?)>(?=[ =])", r"\1\>", text)


def on_config(config: Any) -> Any:
    """Complete the navigation by the generated pages, and by pages of ``docs`` that it does not name."""
    for section in config.nav:
        (title,) = section
        if title == "Methods":
            section[title][1:1] = [{"Cards": [f"methods/{name}.md" for name in method_cards()]}]
        if title == "API":
            section[title] += [f"api/{name}.md" for name in _packages()]
    named = set(re.findall(r"'([\w/]+\.md)'", str(config.nav)))
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    if others:
        config.nav.append({"More": others})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {"methods/index.md": _methods(), "plugins.md": _plugins()}
    pages |= {f"api/{name}.md": _api(name, names) for name, names in _packages().items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def _readme_section(title: str) -> str:
    """Return a section of the README with links as from a page of ``docs``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return text.replace("](docs/", "](").strip()


def _methods() -> str:
    names = {name.lower(): name for name in method_cards()}

    def linked(match: re.Match[str]) -> str:
        return f"[`{match[1]}`]({names[match[1].lower()]}.md)" if match[1].lower() in names else match[0]

    text = re.sub(r"`(\w+)`", linked, _readme_section("Methods").replace("](", "](../").replace("](../http", "](http"))
    return f"# Methods\n\n`lightning-contrast methods` prints this list.\n\n{text}\n"


def _plugins() -> str:
    intro = "Callbacks for any Trainer, in the order of what they are used for. [API](api/callbacks.md).\n\n"
    return f"# Plug-ins\n\n{intro}{_readme_section('Callbacks')}\n"


def _measured() -> dict[str, list[str]]:
    """Return the rows of the table of ``docs/learn.md`` by their first cell."""
    text = (ROOT / "docs" / "learn.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0]: row for row in rows if len(row) == 8}


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Complete the pages of the methods."""
    name = page.file.src_uri.removeprefix("methods/").removesuffix(".md")
    card = method_cards().get(name) if page.file.src_uri.startswith("methods/") else None
    return _card(card, markdown, _measured()) if card else markdown


def _card(card: MethodCard, markdown: str, measured: dict[str, list[str]]) -> str:
    """Return the page of one method, given what ``docs/methods`` has."""
    written = card_sections(markdown)
    lines = [f"# {card.name}", "", f"**{card.idea[:1].upper()}{card.idea[1:]}**", "", written["idea"], ""]
    lines += [
        "## Data flow",
        "",
        flow_figure(written["flow"], lambda name: hasattr(losses, name)),
        "",
        card.summary,
        "",
    ]
    lines += ["## Equation", "", _typeset(written["Equation"]), ""]
    lines += ["## Source and differences", "", _linked(card.source), ""]
    lines += ["## Defaults", "", written["Defaults"], "", "| argument | default | meaning |", "|---|---|---|"]
    for argument in card.arguments:
        default = f"`{argument.default}`" if argument.default else ""
        text = _linked(argument.text.replace("|", "\\|"))
        lines.append(f"| `{argument.name}` | {default} | {text} |")
    lines += ["", f"Further arguments: [API reference](../api/methods.md#lightning_contrast.methods.{card.name}).", ""]
    if card.views:
        lines += [f"Published views: `{card.name}.views(size)`, which is `augment.{card.views}`.", ""]
    lines += ["## Pitfalls", "", written["Pitfalls"], "", "## Recipes", ""]
    lines += [f"- `lightning-contrast fit --config {name}`: {text}" for name, text in card.recipe_notes.items()] or [
        "None."
    ]
    lines += ["", "## Measured", ""]
    stems = [name.removesuffix("_emoji") for name in card.recipes if name.endswith("_emoji")]
    found = [measured[stem] for stem in stems if stem in measured]
    if found:
        lines += ["| recipe | epochs | k-NN | of seeds | linear | recall@1 | seeds |", "|---|---|---|---|---|---|---|"]
        lines += [f"| {row[0]}_emoji | {' | '.join(row[1:6])} | {row[7]} |" for row in found]
        pixels, weights = measured["raw pixels"], measured["random convnet"]
        lines += ["", f"Raw pixels: k-NN {pixels[2]}, linear {pixels[4]}, recall@1 {pixels[5]}; a random convnet: "]
        lines[-1] += f"{weights[2]}, {weights[4]}, {weights[5]}."
        lines += ["Small runs on bundled images: definitions, machine and limits are in [Results](../learn.md)."]
    else:
        lines += ["Not in the table of [results](../learn.md)."]
    file = card.path.relative_to(ROOT).as_posix()
    return "\n".join([*lines, "", f"Code: [{file}]({_SOURCE}{file}).", ""])


def card_sections(markdown: str) -> dict[str, str]:
    """Return "title", "idea" and "flow" of a page of ``docs/methods``, and its sections by their headings."""
    first, *rest = re.split(r"(?m)^## ", markdown)
    start = re.fullmatch(r"# (?P<title>\w+)\n\n(?P<idea>.*?)\n\n```flow\n(?P<flow>.*?)\n```\s*", first, re.S)
    if start is None:
        raise ValueError(f"a card begins with `# NAME`, the idea and a `flow` fence, got {first[:80]!r}")
    return start.groupdict() | {heading: text.strip() for heading, text in (part.split("\n", 1) for part in rest)}


def _typeset(text: str) -> str:
    """Return a text whose ``math`` fences, in LaTeX, are MathML."""

    def equation(match: re.Match[str]) -> str:
        return f'<div class="equation">{convert(match[1], display="block")}</div>'

    return re.sub(r"(?ms)^```math\n(.*?)\n```$", equation, text)


def _linked(text: str) -> str:
    """Return a text in which addresses are links."""
    return re.sub(r"(?<![(<])(https?://[^\s,;)]+[^\s,;).])", r"<\1>", text)


def _packages() -> dict[str, list[str]]:
    """Return the public classes and functions of each public package that the top level names."""
    import lightning_contrast

    modules = {name: getattr(lightning_contrast, name) for name in sorted(lightning_contrast.__all__) if name.islower()}
    found = {}
    for name, module in modules.items():
        public = sorted(module.__all__, key=str.lower)
        found[name] = [one for one in public if _is_documented(getattr(module, one))]
    return found


def _is_documented(member: Any) -> bool:
    return inspect.isclass(member) or inspect.isfunction(member)


def _api(package: str, names: list[str]) -> str:
    import lightning_contrast

    first = (getattr(lightning_contrast, package).__doc__ or "").strip()
    entries = [f"::: lightning_contrast.{package}.{name}" for name in names]
    return f"# lightning_contrast.{package}\n\n{first}\n\n" + "\n\n".join(entries) + "\n"
