"""What a user can fix, as one family of exceptions.

Every command line prints such an error as one line and exits non-zero (DESIGN 5). Our own broken invariants are
asserts instead: those are bugs and keep their traceback. The message names the field or file, what was found and
what is needed.
"""


class MegatronVlmError(ValueError):
    """Base of everything a user can fix."""


class ConfigError(MegatronVlmError):
    """A recipe key or command-line option is wrong."""


class DataError(MegatronVlmError):
    """A data file, sample or picture is wrong."""


class CheckpointError(MegatronVlmError):
    """A checkpoint is missing, damaged or belongs to another model."""


class ConversionError(MegatronVlmError):
    """Weights do not fit the model they are to be converted to."""


class ParallelError(MegatronVlmError):
    """The ranks, their number or their groups do not fit the layout."""


class TrainingError(MegatronVlmError):
    """A run cannot go on: its numbers are not finite, or what it reports cannot be written."""


class NotFiniteError(TrainingError):
    """A run's numbers are not finite; raised by all ranks together."""
