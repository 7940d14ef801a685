"""EquiAV: audio-visual contrastive pretraining that leverages equivariance (ICML 2024)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equiav.api import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # what it needs takes seconds, and few need it
        from equiav.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
