"""The command ``lightning-contrast search``: find images by words or an image, in the terminal or in a browser."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_contrast._checks import require
from lightning_contrast.cli._command_line import Parser

_DESCRIPTION = "Search an index by words or by an image, or serve its page for a browser on this machine."


def run_search(args: Sequence[str]) -> Any:
    """Parse the arguments of the command, and print the hits or serve the page.

    Args:
        args: Arguments after the name of the command.

    Returns:
        The hits; None of the page.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
        ValueError: If there is not exactly one of ``--words``, ``--image`` and ``--page``.
    """
    from lightning_contrast.search import ImageIndex, create_search_app
    from lightning_contrast.serving import serve

    parser = Parser(prog="lightning-contrast search", description=_DESCRIPTION)
    parser.add_argument("store", type=str, help="folder of the index")
    parser.add_argument("--model", type=str, required=True, help="the model of the index")
    parser.add_argument("--words", type=str | None, default=None, help="words to search by")
    parser.add_argument("--image", type=str | None, default=None, help="image file to search by")
    parser.add_argument("--page", type=bool, default=False, help="serve the page")
    parser.add_argument("--k", type=int, default=10, help="number of hits")
    parser.add_argument("--where", type=str | None, default=None, help="SQL condition, such as \"folder = 'town'\"")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address; the default is this machine only")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one")
    found = parser.parse_args(list(args))
    given = [name for name in ("words", "image", "page") if found[name] not in (None, False)]
    require(len(given) == 1, "search", "have one of --words, --image and --page true", given, "Give one of them")
    index = ImageIndex(found.store, found.model)
    if found.page:
        serve(create_search_app(index), host=found.host, port=found.port)
        return None
    hits = index.search(Path(found.image) if found.words is None else found.words, found.k, where=found.where)
    for hit in hits:
        sys.stdout.write(f"{hit.score:.4f} {hit.path}\n")
    return hits
