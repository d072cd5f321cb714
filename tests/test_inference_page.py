"""docs/inference.md: its transformers blocks run as they stand, links exist; and the guide's chapter on inference."""

import re
from pathlib import Path

import pytest
import torch
from models import logits, tiny

from auto_round import AutoRound
from auto_round.backends.base import Kernel, backends
from auto_round.core.errors import FormatError

PAGE = Path(__file__).parent.parent / "docs/inference.md"
BLOCKS = [
    code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "not run" not in code
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The names that the page uses."""
    root = tmp_path_factory.mktemp("page")
    tiny("llama", root / "plain", hidden_size=128, intermediate_size=256)
    job = AutoRound(root / "plain", group_size=32, iters=0, disable_opt_rtn=True)
    job.quantize_and_save(root, format="auto_round,auto_gptq")
    return {"folder": root / "auto-round", "gptq_folder": root / "auto-gptq", "plain_folder": root / "again"}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of layers it did not write
def test_the_blocks_of_the_page_run_one_after_the_other(folders, capsys):
    pytest.importorskip("peft")
    names = dict(folders)
    for code in BLOCKS:
        exec(compile(code, str(PAGE), "exec"), names)
    assert "There is a girl who likes adventure," in capsys.readouterr().out
    assert torch.isfinite(logits(names["adapted"])).all()
    assert (folders["plain_folder"] / "model.safetensors").is_file()


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()))
def test_links_of_the_page_lead_somewhere(target):
    assert (PAGE.parent / target).exists()


def test_every_server_of_the_page_says_whether_it_was_run():
    for part in re.split(r"\n## ", PAGE.read_text())[1:]:
        name, _, text = part.partition("\n")
        assert "Run here" in text or "Not tried here" in text, name


def chapter(device, backend=None):
    """The code block of the guide's chapter 4 for one device, as it stands there but for the model's name."""
    config = "" if backend is None else f"quantization_config = AutoRoundConfig({backend})\n"
    option = "" if backend is None else "quantization_config=quantization_config, "
    return f"""
from transformers import AutoModelForCausalLM, AutoTokenizer, AutoRoundConfig
{config}model = AutoModelForCausalLM.from_pretrained(model_name, device_map="{device}", {option}torch_dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model_name)
text = "There is a girl who likes adventure,"
inputs = tokenizer(text, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=False)[0]))
"""


HERE = [
    ("auto-round", None),
    ("auto-round", 'backend="ark"'),
    ("auto-gptq", ""),
    ("auto-round", 'backend="torch"'),
]


@pytest.mark.parametrize(("fmt", "backend"), HERE, ids=str)
def test_the_guides_blocks_for_a_cpu_run(folders, capsys, fmt, backend):
    if backend == 'backend="ark"' and (reason := backends()["ark"].missing()):
        pytest.skip(reason)
    names = {"model_name": folders["folder"].parent / fmt}
    exec(chapter("cpu", backend), names)
    assert "There is a girl who likes adventure," in capsys.readouterr().out
    used = {m.backend for m in names["model"].modules() if isinstance(m, Kernel)}
    assert len(used) == 1 and (backend in (None, "") or used.pop() in backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a card")
@pytest.mark.parametrize("device", ["cuda", "xpu", "hpu"])
def test_the_guides_blocks_for_other_devices_say_what_is_missing(folders, device):
    # torch says it in several ways: not compiled in, unknown name, module of the vendor not installed.
    missing = (RuntimeError, AssertionError, ValueError, ImportError)
    with pytest.raises(missing, match=rf"(?i){device}|accelerator"):
        exec(chapter(device), {"model_name": folders["folder"]})


@pytest.mark.parametrize("name", ["marlin", "exllamav2", "triton", "hpu"])
def test_backends_that_the_guide_names_for_other_devices_are_refused_by_name(folders, name):
    with pytest.raises(FormatError, match=rf"'{name}' cannot run it.*device cpu is not among"):
        exec(chapter("cpu", f'backend="{name}"'), {"model_name": folders["folder"]})
