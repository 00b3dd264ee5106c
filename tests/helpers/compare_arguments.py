"""Command lines of comparisons, from parts that overrule each other."""


def overruled(*arguments):
    """Return the arguments, of each setting the last one."""
    return [*{argument.partition("=")[0].lstrip("+"): argument for argument in arguments}.values()]
