"""The command ``lightning-contrast serve``: serve embeddings and cosines of images over HTTP, on this machine."""

from collections.abc import Sequence
from typing import Any

from lightning_contrast.cli._command_line import Parser

_DESCRIPTION = "Serve embeddings and cosine similarities of images over HTTP, without authentication."


def run_serve(args: Sequence[str]) -> Any:
    """Parse the arguments of the command and serve until SIGINT or SIGTERM.

    Args:
        args: Arguments after the name of the command.

    Raises:
        SystemExit: With status 2, if the arguments cannot be parsed.
    """
    from lightning_contrast.serving import Limits, create_app, serve

    parser = Parser(prog="lightning-contrast serve", description=_DESCRIPTION)
    parser.add_argument("model", type=str, help="ONNX graph, folder of `export_towers`, .pt or .ckpt file")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address; the default is this machine only")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one")
    parser.add_argument("--max_batch", type=int, default=16, help="largest batch of the model")
    parser.add_argument("--max_delay", type=float, default=0.002, help="seconds that an image waits for others")
    parser.add_argument("--threads", type=int | None, default=None, help="threads of ONNX Runtime; default: all cores")
    parser.add_class_arguments(Limits, "limits")
    found = parser.parse_args(list(args))
    limits = Limits(**found.limits.as_dict())
    settings = {name: found[name] for name in ("max_batch", "max_delay", "threads")}
    serve(create_app(found.model, limits=limits, **settings), host=found.host, port=found.port)
