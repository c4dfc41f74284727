"""``inferneo chat``: the command and its options."""

from typing import Annotated

import typer

from server.cli.chat import BEGINNING


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Id or alias of a model of the server, or what a server is to be started with.",
            show_default="the server's first that chats",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Of any server that speaks OpenAI's API.",
            show_default="the settings' host and port",
        ),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option(
            "--message", "-m", metavar="TEXT", help="Ask this, print the answer, and end."
        ),
    ] = None,
    system: Annotated[
        str, typer.Option(metavar="TEXT", help="What the model is told before all else.")
    ] = "",
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A parameter of the API, such as temperature=0; may be repeated.",
            show_default=" ".join(f"{name}={value}" for name, value in BEGINNING.items()),
        ),
    ] = None,
) -> None:
    """Talk to a model, in the terminal or in a script.

    If no server runs on this machine, one is started for the chat.
    An API key is read from INFERNEO_API_KEY, or asked for.
    With --message, or text on standard input, only the answer is printed.

      inferneo chat
      inferneo chat my-model --url http://gpu-host:8000
      inferneo chat -m "What is the capital of Japan?" --set temperature=0
      git diff | inferneo chat --system "Review this change."
    """
    from server.cli.chat.run import Wish, run

    run(Wish(model=model, url=url, message=message, system=system, parameters=parameters or []))
