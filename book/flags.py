"Which flagged cells and tests run: those that SHARETIE_FLAGS names, `long` with any of them, and `gpu` where CUDA is present."
import os

from nbdev.config import get_config


def known_flags():
    "Every flag that settings.ini knows."
    return set(get_config().tst_flags.split())


def flags_asked():
    "The flags that SHARETIE_FLAGS names, and `long`; an unknown one is an error, for a misspelt flag would silently run nothing."
    asked = set(os.environ.get("SHARETIE_FLAGS", "").split())
    if asked - known_flags():
        raise ValueError(f"unknown flag {', '.join(sorted(asked - known_flags()))}; known: {', '.join(sorted(known_flags()))}")
    return asked | {"long"} if asked else asked  # larger sections build on the long ones


def flags_on():
    "The flags that run here."
    import torch
    return flags_asked() | ({"gpu"} if torch.cuda.is_available() else set())


def flags_off():
    "The flags that do not run here."
    return known_flags() - flags_on()
