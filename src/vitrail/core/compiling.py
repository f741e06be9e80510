"""torch.compile gives up in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitrail.core.errors import UserError


@contextmanager
def compiling(flag: str) -> Iterator[None]:
    """Raises UserError, with the flag that asked for it, where torch.compile or the compiler that it calls gives up."""
    try:
        yield
    except RuntimeError as error:
        if cannot_compile(error):
            raise uncompiled(error, flag) from error
        raise


def cannot_compile(error: BaseException) -> bool:
    """Whether torch.compile, or the compiler that it calls, gave up."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def uncompiled(error: BaseException, flag: str, anew: str = "") -> UserError:
    """anew: what else is to be given, the next time."""
    reason = " ".join(str(error).split("\n\n")[0].split())
    return UserError(
        f"{flag}: torch.compile does not work here ({reason[:200]}); install a C++ compiler and Python's headers (g++ and "
        f"python3-dev, say), or leave {flag} out{anew}."
    )
