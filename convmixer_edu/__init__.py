__version__ = "0.1.0"


def __getattr__(name):
    "`from convmixer_edu import ConvMixer`, without torch before it is asked for."
    if name == "ConvMixer":
        from .model import ConvMixer
        return ConvMixer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
