"""The ways a run can fail, one class per exit code (sysexits.h), so that a scheduler can act on the code.

A message is one sentence or two: what was found, what was needed, what to do.
"""


class QuotesmithError(Exception):
    exit_code = 70


class DataError(QuotesmithError):
    """The input cannot be used: not text, empty, too few quotes, a hash that does not match."""

    exit_code = 65


class InputMissing(QuotesmithError):
    """A named input does not exist."""

    exit_code = 66


class ServiceUnavailable(QuotesmithError):
    """A hub or bucket did not answer, or a GPU was asked for and none is visible."""

    exit_code = 69


class CheckFailed(QuotesmithError):
    """One of our own checks failed, or a tool did: the loss is not finite, a GGUF differs from its checkpoint,
    a file misses a gate."""

    exit_code = 70


class MachineError(QuotesmithError):
    """The machine: disk full, memory short."""

    exit_code = 71


class TargetTaken(QuotesmithError):
    """The write-once target holds a different result."""

    exit_code = 73


class TransferError(QuotesmithError):
    """A transfer is corrupt or keeps failing."""

    exit_code = 74


class TryLater(QuotesmithError):
    """Temporary: another live run, a device error."""

    exit_code = 75


class NotAllowed(QuotesmithError):
    """The service answered 401 or 403, or the folder is not writable."""

    exit_code = 77


class ConfigError(QuotesmithError):
    """Settings that cannot work, alone or together."""

    exit_code = 78
