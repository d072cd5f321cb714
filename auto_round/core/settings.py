"""The only reader of environment variables. Each setting is typed, has a default and one line of explanation."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment can change. Read anew at each call of `settings`, so tests may set variables."""

    log_level: str
    use_modelscope: bool
    cache_weights_share: float


def settings() -> Settings:
    """Read the environment.

    AR_LOG_LEVEL (INFO): level of the `auto_round` logger used by the command line.
    AR_USE_MODELSCOPE (0): fetch models from ModelScope instead of the Hugging Face hub.
    AR_CACHE_WEIGHTS_SHARE (0.25): the torch backend keeps dequantized weights of a loaded model when they need at
        most this share of the free memory, else it dequantizes at each call.
    """
    return Settings(
        log_level=os.environ.get("AR_LOG_LEVEL", "INFO").upper(),
        use_modelscope=os.environ.get("AR_USE_MODELSCOPE", "0").casefold() in ("1", "true", "yes"),
        cache_weights_share=float(os.environ.get("AR_CACHE_WEIGHTS_SHARE", "0.25")),
    )
