__version__ = "0.1.0.dev0"

import os as _os
import sys as _sys

if "torch" not in _sys.modules and "OMP_WAIT_POLICY" not in _os.environ:
    # read when torch loads: threads that wait give way on a busy machine, see nbs/W5_machine
    _os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name):
    "`from convmixer_edu import ConvMixer`, without torch before it is asked for."
    if name == "ConvMixer":
        from .model import ConvMixer
        return ConvMixer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
