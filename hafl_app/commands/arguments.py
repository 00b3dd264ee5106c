"""Arguments that commands share: settings, folders, and the file of a figure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from hafl_app.commands.completion import settings as complete_settings

PASSED_ON: Final = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
"""Of a command that takes settings: what looks like an option may be one of Hydra's."""
Command = Callable[..., Any]
FOLDER: Final = click.Path(path_type=Path)
_FORMATS: Final = (".png", ".svg", ".pdf")


class _Figure(click.Path):
    """Name of a figure's file, refused before anything is drawn if it has no known suffix."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.suffix.lower() not in _FORMATS:
            self.fail(f"{path}: expected a name that ends in {', '.join(_FORMATS)}", param, ctx)
        return path


FIGURE: Final = _Figure()


def _config_dir(context: click.Context, parameter: click.Parameter, folder: str | None) -> None:
    del context, parameter
    if folder is not None:
        from hafl_app.config.files import ConfigFolderError, use_own_folder  # noqa: PLC0415

        try:
            use_own_folder(folder)
        except ConfigFolderError as error:
            raise click.UsageError(str(error)) from error


def takes_settings(command: Command) -> Command:
    """Give a command the arguments of a run, and a folder with more files of settings."""
    command = click.option(
        "-cd",
        "--config-dir",
        metavar="DIR",
        expose_value=False,
        is_eager=True,
        callback=_config_dir,
        help="Folder of your own files of settings, laid out like conf/: DIR/experiment/mine.yaml "
        "is experiment=mine.",
    )(command)
    return click.argument(
        "arguments",
        nargs=-1,
        metavar="[SETTING=VALUE]...",
        type=click.UNPROCESSED,
        shell_complete=complete_settings,
    )(command)


def began(context: click.Context) -> tuple[str, ...]:
    """Return how this command began, to be typed again."""
    from hafl_app.config.files import own_folder  # noqa: PLC0415

    own = own_folder()
    program = context.obj or ("hafl", context.info_name or "")
    return (*program, *(("--config-dir", str(own)) if own else ()))
