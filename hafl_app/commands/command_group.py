"""A group of commands: in the order in which they are needed, with a hint for a wrong name."""

import difflib

import click


class CommandGroup(click.Group):
    """Commands in the order in which they are needed, and a hint for one that does not exist."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in their order."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant, or refuse its name with a hint."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"{args[0]}: no such command; {self._meant(args[0])}")
        return super().resolve_command(ctx, args)

    def _meant(self, name: str) -> str:
        if "=" in name:
            return f"settings come after one, as in hafl simulate {name}"
        near = [known for known in self.commands if known.startswith(name)]
        near = near or difflib.get_close_matches(name, self.commands, n=1)
        return f"did you mean {near[0]}?" if near else f"there are {', '.join(self.commands)}"
