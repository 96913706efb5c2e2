"""Beyond one run: what it costs, and many runs that share what they can."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["costs", "sweeps"],
    submod_attrs={
        "grids": ["expand", "grid_from_dict", "read_grid"],
        "shapes": ["BYTES", "LLAMA2_70B", "LLAMA2_7B", "shape_of"],
    },
)
