"""Checkpoints from strangers: nothing in them runs code or reads files elsewhere; what does not fit is an error."""

import json
import pickle
import shutil

import pytest
import torch
from models import loaded, logits, tiny
from safetensors.torch import load_file, save_file

from auto_round import AutoRound, AutoRoundConfig
from auto_round.core.errors import AutoRoundError, FormatError
from auto_round.core.registry import discover

RTN = {"iters": 0, "disable_opt_rtn": True, "group_size": 32}
UP = "model.layers.0.mlp.up_proj"
BOMB = "import pathlib; pathlib.Path({!r}).write_text('ran')\nclass Evil: pass\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same Llama plain and quantized: name -> folder."""
    root = tmp_path_factory.mktemp("untrusted")
    tiny("llama", root / "plain", num_hidden_layers=1)
    AutoRound(root / "plain", **RTN).quantize_and_save(root, format="auto_round,auto_gptq,auto_awq")
    return root


@pytest.fixture
def fired(tmp_path):
    """A file that exists once hostile code has run; `evil.py`, which makes it, lies beside the checkpoint."""
    sign = tmp_path / "fired"
    (tmp_path / "evil.py").write_text(BOMB.format(str(sign)))
    return sign


def copied(folders, name, tmp_path):
    """A copy of a folder, to damage."""
    return shutil.copytree(folders / name, tmp_path / "checkpoint")


def edit(folder, **changes):
    """Set entries of config.json; those of the quantization config with `q`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.get("quantization_config", {}).update(changes.pop("q", {}))
    path.write_text(json.dumps(config | changes))


AUTO_MAPS = ["evil.Evil", "../evil.Evil", "../../evil.Evil", "someone/else--evil.Evil"]


@pytest.mark.parametrize("target", AUTO_MAPS)
@pytest.mark.parametrize("name", ["auto-round", "plain"])
def test_a_class_that_the_config_names_is_not_imported(folders, tmp_path, fired, name, target):
    folder = copied(folders, name, tmp_path)
    shutil.copy(tmp_path / "evil.py", folder / "evil.py")
    edit(folder, auto_map={"AutoConfig": target, "AutoModelForCausalLM": target})
    assert torch.isfinite(logits(loaded(folder))).all()
    if name == "plain":
        AutoRound(folder, **RTN).quantize_and_save(tmp_path / "out")
    assert not fired.exists()


@pytest.mark.parametrize(
    "name",
    ["os.system", "../evil", "evil:Evil", "auto_round:../../evil", "builtins.eval", "__import__('os')"],
)
@pytest.mark.parametrize("key", ["packing_format", "backend", "data_type"])
def test_a_plugin_that_the_config_names_is_looked_up_and_never_imported(folders, tmp_path, fired, key, name):
    folder = copied(folders, "auto-round", tmp_path)
    edit(folder, q={key: name})
    with pytest.raises(FormatError) as caught:
        loaded(folder, backend=None)
    assert name.casefold() in str(caught.value).casefold() and not fired.exists()


def test_only_modules_of_the_package_are_plugins():
    assert {type(entry).__module__.split(".")[0] for entry in discover("auto_round.backends").values()} == {
        "auto_round"
    }


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, sign):
        self.sign = sign

    def __reduce__(self):
        return (exec, (BOMB.format(str(self.sign)),))


@pytest.mark.parametrize("way", ["load", "quantize"])
def test_pickled_weights_do_not_run_code(folders, tmp_path, fired, way):
    folder = copied(folders, "auto-round" if way == "load" else "plain", tmp_path)
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"model.norm.weight": Bomb(fired)}, file, protocol=2)
    with pytest.raises((AutoRoundError, OSError, pickle.UnpicklingError, ValueError, RuntimeError)):
        loaded(folder) if way == "load" else AutoRound(folder, **RTN).quantize_and_save(tmp_path / "out")
    assert not fired.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/{}/outside.safetensors", "a/../../outside.safetensors"]
)
def test_an_index_does_not_reach_out_of_its_folder(folders, tmp_path, place):
    folder = copied(folders, "plain", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    target = place.format(str(tmp_path).lstrip("/"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, target)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AutoRoundError) as caught:
        AutoRound(folder, **RTN).quantize_and_save(tmp_path / "out")
    assert "outside.safetensors" in str(caught.value) and not (tmp_path / "out").exists()


CAST = [("qweight", torch.int64), ("qzeros", torch.int16), ("scales", torch.int8)]


@pytest.mark.parametrize(("part", "dtype"), CAST, ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_tensor_of_another_kind_of_number_is_named(folders, tmp_path, part, dtype, backend):
    folder = copied(folders, "auto-round", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"{UP}.{part} is {dtype}.*damaged or of another format"):
        loaded(folder, backend=backend)


@pytest.mark.parametrize("index", [10**9, -1, 7], ids=str)
def test_a_column_order_out_of_range_is_refused(folders, tmp_path, index):
    folder = copied(folders, "auto-gptq", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.g_idx"][5] = index
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=UP):
        loaded(folder, quantization_config=AutoRoundConfig())


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("shape", [(0,), (1, 1), (3, 5, 7), (1 << 20,)], ids=str)
@pytest.mark.parametrize("name", ["auto-round", "auto-awq"])
def test_a_tensor_of_any_other_shape_is_never_loaded(folders, tmp_path, name, part, shape):
    folder = copied(folders, name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{part}"] = torch.zeros(shape, dtype=tensors[f"{UP}.{part}"].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {} if name == "auto-round" else {"quantization_config": AutoRoundConfig()}
    with pytest.raises((FormatError, RuntimeError), match=r"mismatch|shape"):
        loaded(folder, **config)
