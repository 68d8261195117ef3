"""Every error that the package raises on purpose: the message names the culprit and the way out."""

from textwrap import shorten

__all__ = [
    "AdaDFQError",
    "BrokenPluginError",
    "DataError",
    "ModelError",
    "OutputError",
    "SettingsError",
    "UnknownNameError",
    "UntraceableError",
    "first_line",
]

LONGEST = 300
"""Characters of a message that continues on a second line: lists of tensors are long."""


class AdaDFQError(Exception):
    """Base of all errors of this package; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class SettingsError(AdaDFQError):
    """A setting, preset, file of settings or argument that can't be used as given."""

    exit_code = 2


class UnknownNameError(SettingsError):
    """A name that no method, backend, preset or setting goes by; the nearest one is named."""


class ModelError(AdaDFQError):
    """A model that can't be calibrated: not prepared, already converted, NaN weights, never trained."""

    exit_code = 3


class UntraceableError(ModelError):
    """A model that can't be rewritten for the FX tracer; the module and the reason are named."""


class DataError(AdaDFQError):
    """A checkpoint, image folder or synthetic set that can't be read."""

    exit_code = 4


class OutputError(AdaDFQError):
    """An output folder that can't be written."""

    exit_code = 5


class BrokenPluginError(AdaDFQError):
    """An entry point that fails to load, ours (`pt2e` without torchao) or another's; its distribution is named."""

    exit_code = 6


def first_line(error: BaseException) -> str:
    r"""What an error says first, for a message of one line; its type where it says nothing.

    Example:
        >>> first_line(ValueError("no such file\nfor reasons")), first_line(KeyError())
        ('no such file', 'KeyError')
        >>> first_line(RuntimeError("Errors in loading:\n\tsize mismatch for fc\n\tand others"))
        'Errors in loading: size mismatch for fc'
    """
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return shorten(f"{first} {others[0].strip()}", LONGEST) if first.endswith(":") and others else first
