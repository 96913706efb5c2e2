"""Around the course: the environment, checkpoints, a classroom without network, rendering."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["checkpoints", "classroom", "render", "timings"]
)
