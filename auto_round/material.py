"""What a job works on: the model as files, skeleton or module, its tokenizer, and the calibration data."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from auto_round.core.errors import DataError, ModelError
from auto_round.core.plan import Plan
from auto_round.core.scheme import Scheme
from auto_round.core.selection import parse_layer_config
from auto_round.jobs.planner import rounded
from auto_round.models import hub, load
from auto_round.models.checkpoint import has_safetensors
from auto_round.models.device import parse_devices
from auto_round.models.gguf_folder import unpack
from auto_round.models.hub_shards import HubShards, open_shards
from auto_round.models.memory import available_memory, give_back, resident_memory
from auto_round.models.quirks import EMBEDDINGS
from auto_round.models.shards import parse_size
from auto_round.models.skeleton import Skeleton, filled
from auto_round.models.stored import lacking, streamed_subject
from auto_round.models.subject import Candidates, Origin, Subject, check_streamed, open_subject
from auto_round.options import Options
from auto_round.planning import weights_alone
from auto_round.recipes import recipe_named
from auto_round.rotating import Rotator
from auto_round.samples import fitting, samples_of_use
from auto_round.sources import plain
from auto_round.sources.base import Needs
from auto_round.sources.dataset import Calibration, Request, load_calibration
from auto_round.sources.dataset_names import DEFAULT_DATASET
from auto_round.sources.self_text import TOGETHER, Author, bytes_of_one

logger = logging.getLogger("auto_round")
SMALL_SHARE = 1 / 16
"""A model of at most this share of the free memory is loaded as a whole, so that it can be returned."""


class WeightsHome(NamedTuple):
    """Whether the model is in memory as a whole, else block by block, and what decided it."""

    whole: bool
    why: str


class Material:
    """Model and data of one job, each opened when first asked for."""

    def __init__(self, model: str | Path | nn.Module, tokenizer: Any, options: Options, base: Scheme) -> None:
        self.options, self.base, self.given = options, base, model
        self._tokenizer, self._whole = tokenizer, False
        self._subject: Subject | None = None
        self._calibration: Calibration | None = None
        self._cache_ranges: Mapping[str, tuple[Tensor, Tensor]] | None = None
        self._shards: HubShards | None = None
        self.rotator = Rotator(options)
        self.author_bytes = 0  # predicted peak of this process while the model wrote its own calibration text
        if isinstance(model, nn.Module):
            self.model: nn.Module | None = model.eval()  # dropout would give the float output noise to match
            self.folder: Path | None = None
        else:
            self.model = None
            self._shards = self._on_the_hub(str(model))
            self.folder = (
                self._shards.folder
                if self._shards is not None
                else self._opened(load.resolve(str(model), platform=options.platform))
            )

    def _on_the_hub(self, model: str) -> HubShards | None:
        """The shards of a hub model that is streamed, which need not be on this machine all at once."""
        # Other machines look for the files where this one has put them.
        if self.options.distributed is not None or not self._streams():
            return None
        return open_shards(model) if hub.serves(model, self.options.platform) else None

    def _here(self) -> Path:
        """The folder with all of its weights, downloaded if they were not to be."""
        assert self.folder is not None, "a folder is given"
        if self._shards is not None:
            self.folder = load.resolve(self._shards.model, platform=self.options.platform)
            self._shards = None
        return self.folder

    def _opened(self, place: Path) -> Path:
        """`place`, or the folder that a GGUF file is unpacked into: its weights are read where they are."""
        if not place.is_file():
            return place
        folder = tempfile.mkdtemp(prefix="auto_round_gguf_")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return unpack(place, Path(folder))

    @property
    def whole(self) -> bool:
        """Whether embedding and head are quantized too, as some formats do, which makes layers of them."""
        return self._whole

    @whole.setter
    def whole(self, wanted: bool) -> None:
        if wanted is not self._whole:
            self._whole, self._subject = wanted, None  # other layers: read the anatomy anew
            self.rotator.forget()

    def subject(self) -> Subject:
        """The model as files and layers."""
        streams = self.folder is not None and load.has_weights(self.folder) and self._streams()
        if self._subject is None and self.folder is not None and streams:
            files = plain.open_folder(self.folder, self._shards)
            self._subject = streamed_subject(
                files,
                embedding=self._whole or self._embedding_named(),
                blocks=self.options.to_quant_block_names,
                trust_remote_code=self.options.trust_remote_code,
            )
            if self._subject is not None and not _names_tell_all(self.folder, files, self.options):
                self._subject = None
        if self._subject is None:
            self._subject = self._of_tree()
        return self._subject

    def _of_tree(self) -> Subject:
        """The model by its module tree."""
        options = self.options
        origin = Origin(
            folder=None if self.folder is None else self._here(),
            model=self.model,
            load_live=self.live_model if self.rotator.wish is None else self.rotator.refuse,
            tokenizer=self._tokenizer,
            trust_remote_code=options.trust_remote_code,
            dtype=options.model_dtype or "auto",
            opener=plain.open_folder,
            fuse=self.rotator.fuse,
        )
        candidates = Candidates(
            blocks=options.to_quant_block_names,
            named=parse_layer_config(options.layer_config),
            head=options.quant_lm_head,
            embedding=self._whole or self._embedding_named(),
        )
        return open_subject(origin, candidates)

    def train_rotations(self, plan: Plan) -> bool:
        """Find the rotations that weights take up from now on, for `plan`. False when there is nothing to train."""
        if not self.rotator.untrained:
            return False
        self._calibration = self._calibration or self.data(required=True)
        assert self._calibration is not None, "data is required"
        upright = self.subject()
        model = self.model if self.model is not None else self._as_read(upright)
        self.rotator.train(model, upright, plan, self._calibration)
        if self.folder is not None:  # what was loaded for this, or to write its own text, is not rotated
            self.model = None
            self.rotator.turns = {}
        self._subject = None
        self.rotator.forget()
        return True

    def turn(self, plan: Plan) -> None:
        """From now on, turn the inputs of the layers of `plan` that rotations ask for."""
        self._subject = self.rotator.turn(self.subject(), plan, self.model)

    def _embedding_named(self) -> bool:
        """Whether `layer_config` has the full name of a table of embeddings, which then counts as a layer."""
        named = parse_layer_config(self.options.layer_config)
        return any(word in key.rpartition(".")[2] for key in named for word in EMBEDDINGS)

    def _streams(self) -> bool:
        """Whether weights are all that this job will look at, whatever data there is."""
        return self.model is None and self.rotator.wish is None and weights_alone(self.options, self.base)

    def _is_packed(self) -> bool:
        """Whether the model's own weights are packed: transformers would not load them as plain ones."""
        if self.folder is None:
            return False
        if "quantization_config" in load.read_config(self.folder):
            return True
        return not has_safetensors(self.folder) and load.has_weights(self.folder)

    def live_model(self) -> nn.Module:
        """The model as a whole, loaded when first asked for; dequantized when its own weights are packed."""
        if self.model is None:
            self.model = self._loaded()
        return self.model

    def _loaded(self) -> nn.Module:
        folder = self._here()
        if self.rotator.wish is not None:
            return self._as_read(self.subject())
        if self._is_packed():
            return self._as_read(self._of_tree())
        return load.load_model(
            folder,
            trust_remote_code=self.options.trust_remote_code,
            dtype=self.options.model_dtype or "auto",
        )

    def _as_read(self, subject: Subject) -> nn.Module:
        """The module tree, filled from weights that are dequantized, or rotated, as they are read."""
        if subject.located is None or subject.tree is None:
            raise ModelError(
                f"{self.folder} is quantized already, and its tensors are not those of a model that transformers "
                "knows: give the original model"
            )
        return filled(subject.tree, subject.located)

    def _author(self) -> Author:
        """The model as a whole, which it has to be while it writes its own calibration text; kept only if it is anyway.

        Raises DataError when it does not fit.
        """
        tree = self.subject().tree
        assert tree is not None, "jobs with data have a module tree"
        one = bytes_of_one(tree, self.seqlen())
        give_back()
        base, weights = resident_memory(), 0 if self.model is not None else self.weight_bytes()
        limit = self.options.max_ram
        most = base + available_memory() if limit is None else parse_size(limit, "max_ram")
        together = min(TOGETHER, (most - base - weights) // one)
        if together < 1:
            raise DataError(
                f"dataset 'self': the model writes the text itself and is in memory as a whole meanwhile. That takes "
                f"{base + weights + one:,} bytes of {most:,}: {base:,} for this process, {weights:,} for the weights, "
                f"{one:,} for one sample. Give other calibration data"
                + ("" if limit is None else f", or --max-ram {rounded(base + weights + one)}")
            )
        self.author_bytes = base + weights + together * one
        whole = self.model is not None or self.weights_home().whole
        return Author(self.live_model() if whole else self._loaded(), together)

    def runnable(self) -> nn.Module | Skeleton:
        """The model as a whole when there is one or is to be one, else its skeleton."""
        subject = self.subject()
        if self.model is not None or subject.located is None or subject.tree is None:
            return self.live_model()
        if self.weights_home().whole:
            subject.located.check(subject.tree)
            return self.live_model()
        return Skeleton(subject.tree, subject.located, subject.anatomy.in_order())

    def weights_home(self) -> WeightsHome:
        """Whether the model is loaded as a whole: as was said, else when it is small beside the free memory."""
        said = self.options.low_cpu_mem_usage
        if self.model is not None or self.subject().located is None:
            return WeightsHome(
                True, "they cannot be read block by block" if self.model is None else "as given"
            )
        if said is not None:
            return WeightsHome(not said, f"low_cpu_mem_usage={said}")
        # A limit is kept by holding one block; packed weights are unpacked a block at a time.
        if self._is_packed():
            return WeightsHome(False, "they are quantized already, and unpacked a block at a time")
        if self.options.max_ram is not None:
            return WeightsHome(False, "max_ram is to be kept")
        small = self.weight_bytes() <= SMALL_SHARE * available_memory()
        return WeightsHome(
            small, "the model is " + ("small" if small else "large") + " beside the free memory"
        )

    def weight_bytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(info.nbytes for info in self.subject().files.store.infos.values())

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or that of the model's folder; None when there is none."""
        if self._tokenizer is None and self.folder is not None:
            self._tokenizer = load.load_tokenizer(
                self.folder, trust_remote_code=self.options.trust_remote_code
            )
        return self._tokenizer

    def samples(self, needs: Needs, requires: Needs) -> Calibration | None:
        """The calibration data that a recipe makes use of; loaded once."""
        if needs > Needs.NOTHING and not self.options.model_free and self._calibration is None:
            self._calibration = self.data(required=requires > Needs.NOTHING)
        return self._calibration

    @property
    def calibration(self) -> Calibration | None:
        """The calibration data that this job has looked at so far."""
        return self._calibration

    def nsamples(self) -> int:
        """Calibration samples to look at, where no ranges of inputs are calibrated."""
        return samples_of_use(self.subject(), self.options)

    def data(self, *, required: bool) -> Calibration | None:
        """The calibration data. A recipe that can do without falls back to weights alone when there is none."""
        nsamples = self.options.numbers().nsamples if required else self.nsamples()
        if nsamples == 0:
            if required and self.options.nsamples == 0:
                raise DataError(
                    "nsamples=0: tuning and calibrated input ranges need data; give nsamples, or use iters=0 and a "
                    "scheme with dynamic inputs"
                )
            if not required:
                return None
            # The recipe has none, but the scheme's inputs need a range.
            nsamples = recipe_named("default").nsamples
        request = Request(
            nsamples=nsamples, seqlen=self.seqlen(), seed=self.options.seed, platform=self.options.platform
        )
        dataset = DEFAULT_DATASET if self.options.dataset is None else self.options.dataset
        try:
            data = load_calibration(dataset, self.tokenizer, request, self._author)
        except DataError as error:
            if required or self.options.dataset is not None:  # only data that nobody asked for may be missing
                raise
            logger.warning("optimised RTN goes by weights alone: %s", error)
            return None
        tree = self.subject().tree
        assert tree is not None, "only jobs without data go by names alone"
        rows = tree.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        # Said here, since the embedding would answer with an index error, or on a GPU with a dead context.
        if int(data.tokens.max()) >= rows:
            raise DataError(
                f"dataset: token id {int(data.tokens.max())} is outside the model's vocabulary of {rows}; "
                "is the tokenizer the model's own?"
            )
        return data

    def seqlen(self) -> int:
        """The wanted length, or what the model can take."""
        wanted = self.options.numbers().seqlen
        fits = fitting(wanted, self.subject().files.config)
        if fits < wanted:
            logger.warning("seqlen %d is more than the model's %d positions: using %d", wanted, fits, fits)
        return fits

    def cache_ranges(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What the keys and values of every layer reach on the calibration data; measured once."""
        if self._cache_ranges is None:
            from auto_round.sources.kv_cache import (
                cache_ranges,
            )  # a cache of transformers', seconds to import

            data = self.data(required=True)
            assert data is not None, "required data is there or an error"
            model = self.live_model()
            model.to(parse_devices(self.options.device_map).main)
            self._cache_ranges = cache_ranges(model, data, self.options.numbers().batch_size)
        return self._cache_ranges


def _names_tell_all(folder: Path, files: load.ModelFiles, options: Options) -> bool:
    """Whether names tell all of a checkpoint that is to be streamed, as far as anybody was asked.

    Refuses one that would not load, and warns of one that looks as if something were missing.
    """
    trusted = options.trust_remote_code
    odd = lacking(files.store.infos)
    # Names suffice to stream, and reading them is quick; the architecture is asked when they raise a doubt.
    told = True
    if not options.model_free or odd is not None:
        told = check_streamed(files, trust_remote_code=trusted)
    if odd is not None and not load.knows(folder, trust_remote_code=trusted):
        logger.warning(
            "%s is not in the checkpoint, though every other block has one, and transformers does not know this "
            "architecture. If that is a mistake, download the model again",
            odd,
        )
    return told
