__version__ = "0.1.0"

from importlib import import_module as _import_module

# The few names people start with, imported when first used, so that `import sharetie` costs nothing.
# `census` is not among them: `sharetie.census` is its module, and one name cannot be both.
_lazy = {
    "find_ties": "finding", "tie_": "making", "share_module_": "sharing", "untie_": "sharing",
    "check_ties": "checking", "keep_ties": "binding", "retie_": "binding",
    "save_model": "saving", "load_model": "saving",
    "TiePenalty": "tying", "proximal_": "tying", "anneal": "tying", "harden_": "tying",
}
__all__ = list(_lazy)


def __getattr__(name):
    if name in _lazy: return getattr(_import_module(f"{__name__}.{_lazy[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__(): return [*globals(), *_lazy]
