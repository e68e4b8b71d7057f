"""The ways a run can fail, one class per exit code (sysexits.h), so that a scheduler can act on the code.

A message is one sentence or two: what was found, what was needed, what to do.
"""

USAGE = 2  # click's exit code for a command line that cannot be understood


class QuotesmithError(Exception):
    exit_code = 70
    retry_helps = False  # another attempt, perhaps on another machine, can end otherwise


class DataError(QuotesmithError):
    """The input cannot be used: not text, empty, too few quotes, a hash that does not match."""

    exit_code = 65


class InputMissing(QuotesmithError):
    """A named input does not exist."""

    exit_code = 66


class ServiceUnavailable(QuotesmithError):
    """A hub or bucket did not answer, or a GPU was asked for and none is visible."""

    exit_code = 69
    retry_helps = True


class CheckFailed(QuotesmithError):
    """One of our own checks failed, or a tool did: the loss is not finite, a GGUF differs from its checkpoint,
    a file misses a gate."""

    exit_code = 70


class MachineError(QuotesmithError):
    """The machine: disk full, memory short."""

    exit_code = 71
    retry_helps = True


class TargetTaken(QuotesmithError):
    """The write-once target holds a different result."""

    exit_code = 73


class TransferError(QuotesmithError):
    """A transfer is corrupt or keeps failing."""

    exit_code = 74
    retry_helps = True


class TryLater(QuotesmithError):
    """Temporary: another live run, a device error."""

    exit_code = 75
    retry_helps = True


class NotAllowed(QuotesmithError):
    """The service answered 401 or 403, or the folder is not writable."""

    exit_code = 77


class ConfigError(QuotesmithError):
    """Settings that cannot work, alone or together."""

    exit_code = 78


def no_retry_helps() -> list[int]:
    """The exit codes after which a scheduler should not start the job again. Not those of signals: 130, 143."""
    kinds: list[type[QuotesmithError]] = [QuotesmithError, *QuotesmithError.__subclasses__()]
    return sorted({USAGE, *(kind.exit_code for kind in kinds if not kind.retry_helps)})
