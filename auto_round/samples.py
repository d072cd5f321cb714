"""How many calibration samples a job looks at, and how long they can be."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.models.anatomy import experts_of
from auto_round.models.subject import Subject
from auto_round.options import Options
from auto_round.sources.dataset_spec import parse_spec

logger = logging.getLogger("auto_round")
TOKENS_PER_CHANNEL, LEAST = 16, 32
"""Tokens for each input channel, and samples, from which on more data fit their own kind of text better and others no
more (decision 105)."""


def fitting(seqlen: int, config: Mapping[str, Any]) -> int:
    """`seqlen` tokens, or as many as a model of `config` has positions for."""
    # Multimodal models keep the language model's settings apart.
    text = config.get("text_config") or config
    return min(seqlen, text.get("max_position_embeddings") or text.get("n_positions") or seqlen)


def samples_of_use(subject: Subject, options: Options) -> int:
    """The number of samples that was said, or the recipe's, or as many of these as are of use.

    Where nothing is tuned, data only tell second moments, which are known well enough from a number of tokens for each
    input channel. It is the recipe's number for models with experts, which see few of all tokens, for an importance
    file, which others use too, and for data that were counted out.
    """
    body, numbers = subject.anatomy, options.numbers()
    most = numbers.nsamples
    if most == 0 or numbers.iters or options.nsamples is not None or options.save_imatrix is not None:
        return most
    if _counted(options.dataset) or body.experts or body.routers or any(map(experts_of, body.layers)):
        return most
    seqlen = fitting(numbers.seqlen, subject.files.config)
    width = max((layer.shape[1] for layer in body.layers.values()), default=1)
    enough = max(LEAST, -(-TOKENS_PER_CHANNEL * width // seqlen))
    if enough < most:
        logger.info(
            "calibration: %d samples of %d tokens, not %d: without tuning, %d tokens for each of %d input channels are "
            "enough (--nsamples says otherwise)", enough, seqlen, most, TOKENS_PER_CHANNEL, width,
        )  # fmt: skip
    return min(enough, most)


def _counted(dataset: object) -> bool:
    """Whether somebody chose the number of samples with the data: by `num=`, or by giving them one by one."""
    if isinstance(dataset, str | Path):
        return any(part.num is not None for part in parse_spec(str(dataset)))
    return dataset is not None
