"""Groups of commands whose modules are imported when they are run, and not to list them."""

from importlib import import_module

import click


class LazyCommand(click.Command):
    """Stands in a group's list for a command that is imported when it is run or its help is shown.

    So help and completion name every command at once, without what the commands themselves need.

    Args:
        name: The name in the group.
        place: The command: `module:name`.
        summary: What the list says: the first sentence of the command's own help.
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
    """A group that may hold `LazyCommand`s, besides others."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name, and import it."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, LazyCommand) else command, rest
