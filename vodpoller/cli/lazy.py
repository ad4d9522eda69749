"""Groups of commands. The module of a command is imported when the command runs, not when the group is listed."""

from importlib import import_module

import click


class LazyCommand(click.Command):
    """Represents a command in a group. The command itself is imported when it runs or when its help is shown.

    So help and completion list every command fast, without the imports that the commands need.

    Args:
        name: The name in the group.
        place: The place of the command: `module:name`.
        summary: The text in the list: the first sentence of the help of the command.
    """

    def __init__(self, name: str, place: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.place = place

    def load(self) -> click.Command:
        """Import the command."""
        module, _, name = self.place.partition(":")
        command = getattr(import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.place} is not a command")
        return command


class LazyGroup(click.Group):
    """A group that may contain `LazyCommand`s and other commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name, and import it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, LazyCommand) else command, rest
