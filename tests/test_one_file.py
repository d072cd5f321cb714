"""Adding a data type is one file: a module of `codecs` with an entry is in schemes, lists, formats and checkpoints."""

import sys

import pytest
import torch
from models import loaded, logits, samples, tiny

import auto_round.codecs
from auto_round import AutoRound
from auto_round.cli.main import execute
from auto_round.codecs.base import codec_of, preset, presets
from auto_round.core.registry import discover
from auto_round.formats.base import formats

MODULE = '''
"""MXE1M2: elements of one exponent bit and two of mantissa, 0 to 3.5 in steps of a half, by the thirty-two."""

from auto_round.codecs.mx import Microscaling, _both
from auto_round.core.minifloat import MiniFloat


class MXHalves(Microscaling):
    """Half steps."""

    name = "mx_halves"
    elements = {(4, ""): MiniFloat(bits=4, mantissa=2, least=1, top=3.5)}
    presets = {"MXE1M2": _both("mx_halves", 4)}


ENTRIES = (MXHalves(),)
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The module above, as if it lay in the folder."""
    (tmp_path / "mx_halves.py").write_text(MODULE)
    monkeypatch.setattr(auto_round.codecs, "__path__", [*auto_round.codecs.__path__, str(tmp_path)])
    discover.cache_clear()
    yield
    discover.cache_clear()
    sys.modules.pop("auto_round.codecs.mx_halves", None)


@pytest.mark.usefixtures("added")
def test_a_module_with_an_entry_is_a_scheme_and_in_the_lists(capsys):
    assert "MXE1M2" in presets() and preset("mxe1m2").weight.dtype == "mx_halves"
    assert execute("default", ["list", "scheme"]) == 0
    assert "MXE1M2" in capsys.readouterr().out.replace("\n", "")
    scheme = preset("MXE1M2")
    holders = [name for name, fmt in formats().items() if fmt.reject(scheme, (64, 64)) is None]
    assert {"auto_round", "fake"} <= set(holders)
    assert "int" in formats()["mlx"].reject(scheme, (64, 64))  # a refusal in words, not a failure


@pytest.mark.usefixtures("added")
def test_its_numbers_are_the_nearest_half_steps():
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    spec = preset("MXE1M2").weight
    q = codec_of(spec).quantize(w, spec)
    steps = codec_of(spec).dequantize(q) / (2.0 ** (q.params["scale"].float() - 127)).repeat(1, 32).view(
        4, 64
    )
    assert set(steps.abs().flatten().tolist()) <= {k / 2 for k in range(8)}


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize("iters", [0, 2])
def test_it_is_searched_tuned_written_and_loaded(tmp_path, iters):
    tiny("llama", tmp_path / "model")
    job = AutoRound(
        tmp_path / "model",
        scheme="MXE1M2",
        iters=iters,
        dataset=samples(4),
        nsamples=4,
        seqlen=32,
        batch_size=2,
    )
    job.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    packed, plain = loaded(tmp_path / "out" / "auto-round"), loaded(tmp_path / "out" / "fake")
    name = "model.layers.0.mlp.down_proj"
    kernel = packed.get_submodule(name)
    assert torch.equal(kernel.weight_in(torch.float32), plain.get_submodule(name).weight)
    assert bool(logits(packed).isfinite().all())


def test_it_is_gone_with_its_module():
    assert "MXE1M2" not in presets()
