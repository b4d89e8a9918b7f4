"""The one error that a person at the keyboard may see.

Every fault that a user, a data set or another machine can cause ends in a `UserError` (or a subclass): one line
that states the fact, the numbers, the consequence and the remedy. The command line prints it without a traceback
and exits with `EXIT_CODE`. Anything else that escapes is a defect of ours.
"""

EXIT_CODE = 2


class UserError(Exception):
    """A fault that its reader can mend: one line with fact, numbers, consequence, remedy."""

    def __init__(self, message: str) -> None:
        # Line breaks from third-party messages would tear the one-line rule that logs and scripts rely on.
        super().__init__(" ".join(message.split()))
