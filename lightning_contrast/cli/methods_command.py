"""The command ``lightning-contrast methods``: list the methods, or show the card of one."""

import csv
import io
import sys
from collections.abc import Sequence

from lightning_contrast.cli.commands import LightParser, did_you_mean
from lightning_contrast.cli.method_cards import MethodCard, method_cards

_COLUMNS = ("method", "idea", "papers", "recipes")


def run_methods(args: Sequence[str]) -> str:
    """Print the table of the methods, or the card of one.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The text that was printed.
    """
    parser = LightParser("methods", description="List the methods of the package, or show the card of one.")
    parser.add_argument("name", nargs="?", help="class of a method, such as SimCLR: show its card")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text", help="of the table")
    given = parser.parse_args(args)
    cards = method_cards()
    if given.name is None:
        text = _table(cards, given.format)
    else:
        by_lower = {name.lower(): name for name in cards}
        name = by_lower.get(given.name.lower())
        if name is None:
            parser.error(f"`{given.name}` is no method.{did_you_mean(given.name, cards)} `methods` lists them.")
        text = _card(cards[name])
    sys.stdout.write(text)
    return text


def _table(cards: dict[str, MethodCard], form: str) -> str:
    rows = [(name, card.idea, " ".join(card.papers), " ".join(card.recipes)) for name, card in cards.items()]
    if form == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([_COLUMNS, *rows])
        return file.getvalue()
    if form == "markdown":
        lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
    width = max(map(len, cards))
    lines = [f"{name:{width}}  {card.idea}" for name, card in cards.items()]
    lines += ["", "`methods NAME` shows the papers, arguments and recipes of one."]
    return "\n".join(lines) + "\n"


def _card(card: MethodCard) -> str:
    lines = [f"{card.name}: {card.idea}", "", card.source, "", card.summary, "", "arguments:"]
    for name, default, text in card.arguments:
        lines.append(f"  {name}{f' = {default}' if default else ''}: {text}")
    lines += [f"views: {card.views}"] if card.views else []
    lines += ["", f"recipes: {', '.join(card.recipes) or 'none'}", ""]
    return "\n".join(lines)
