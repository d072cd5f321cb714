"""The errors a user can meet. Every message says where, what was given, what is allowed and what to do."""


class AutoRoundError(Exception):
    """Base of every error this package raises on purpose."""


class SchemeError(AutoRoundError, ValueError):
    """A number format that does not exist, or settings that contradict each other."""


class PlanError(AutoRoundError, ValueError):
    """A layer selection or a per-layer setting that cannot be carried out."""


class FormatError(AutoRoundError, ValueError):
    """A checkpoint format that cannot hold what was asked for, or files that are not in that format."""


class ModelError(AutoRoundError, ValueError):
    """A model that is missing, incomplete, damaged, or of a kind that cannot be worked on."""


class OutputError(AutoRoundError, RuntimeError):
    """An output folder that cannot be written or has no room left."""


class DataError(AutoRoundError, ValueError):
    """Calibration data that cannot be found, read or used."""


class VerificationError(AutoRoundError, RuntimeError):
    """What was written, when read back, is not what was quantized."""


class NotYetError(AutoRoundError, NotImplementedError):
    """Something the product will do that this version does not do yet."""


def nearest(word: str, known: object, *, count: int = 1) -> str:
    """A hint such as ``Did you mean 'W4A16'?`` for `word` among the iterable `known`, or an empty string."""
    import difflib  # needed only where something went wrong

    # Compared in one case, but shown as the user would have to write it.
    names = [str(name) for name in known]  # type: ignore[attr-defined]
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), list(folded), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(folded[name]) for name in close)}?" if close else ""
