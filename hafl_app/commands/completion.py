"""What the shell offers for a setting: names, then the values that it may have."""

import click
from click.shell_completion import CompletionItem


def settings(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the settings, groups and values that go on from what has been typed."""
    del context, parameter
    from hafl_app.config.files import groups  # noqa: PLC0415  with Hydra: only when asked
    from hafl_app.config.schema import declared_settings  # noqa: PLC0415

    values = {name: list(files) for name, files in groups().items()}
    for found in declared_settings():
        choices = ("true", "false") if found.type is bool else ()
        values.setdefault(found.name, list(found.field.metadata.get("choices", choices)))
    name, equals, _ = incomplete.partition("=")
    if equals:
        offered = [f"{name}={value}" for value in values.get(name, [])]
    else:
        offered = [f"{known}=" for known in values]
    return [CompletionItem(text) for text in offered if text.startswith(incomplete)]
