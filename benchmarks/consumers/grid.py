"""The cells of the comparison, one export command each and the same for both packages, and who reads them."""

from dataclasses import dataclass

MIXED_ASYM = "{down_proj:{bits:2,group_size:32}}"
MIXED = "{mlp:{bits:8,group_size:32},k_proj:{bits:16}}"
CALIBRATION = ["--iters", "0", "--nsamples", "16", "--seqlen", "256"]


@dataclass(frozen=True)
class Cell:
    """One export. `options` go to the command line of either package; `refused_by` refuse it by design."""

    name: str
    group: str
    options: tuple[str, ...]
    refused_by: tuple[str, ...] = ()

    @property
    def needs_override(self) -> bool:
        """Whether auto_round reads the folder only when told to (plain GPTQ and AWQ checkpoints)."""
        return self.group in BOTH


def _cell(name: str, group: str, scheme: str, *options: str, refused_by: tuple[str, ...] = ()) -> Cell:
    return Cell(name, group, ("--scheme", scheme, "--format", group, *options), refused_by)


CELLS = [
    _cell("ar_w2_sym", "auto_round", "W2A16"),
    _cell("ar_w3_sym", "auto_round", "W3A16"),
    _cell("ar_w4_sym", "auto_round", "W4A16"),
    _cell("ar_w8_sym", "auto_round", "W8A16"),
    _cell("ar_w2_asym", "auto_round", "W2A16", "--asym"),
    _cell("ar_w3_asym", "auto_round", "W3A16", "--asym"),
    _cell("ar_w4_asym", "auto_round", "W4A16", "--asym"),
    _cell("ar_w8_asym", "auto_round", "W8A16", "--asym", refused_by=("peer",)),
    _cell("ar_w2g32", "auto_round", "W2A16G32"),
    _cell("ar_w2g64_asym", "auto_round", "W2A16G64", "--asym"),
    _cell("ar_w3g32_asym", "auto_round", "W3A16", "--asym", "--group_size", "32"),
    _cell("ar_w4g32", "auto_round", "W4A16", "--group_size", "32"),
    _cell("ar_w4g64", "auto_round", "W4A16", "--group_size", "64"),
    _cell("ar_w4g96", "auto_round", "W4A16", "--group_size", "96"),
    _cell("ar_w4gm1", "auto_round", "W4A16", "--group_size", "-1"),
    _cell("ar_b4g64", "auto_round", "W2A16", "--bits", "4", "--group_size", "64"),
    _cell("ar_w4_lmhead", "auto_round", "W4A16", "--quant_lm_head"),
    _cell("ar_w4_mixed", "auto_round", "W4A16", "--layer_config", MIXED),
    _cell("ar_w4_mixed_asym", "auto_round", "W4A16", "--asym", "--layer_config", MIXED_ASYM),
    _cell("gptq_w2_sym", "auto_gptq", "W2A16"),
    _cell("gptq_w3_sym", "auto_gptq", "W3A16"),
    _cell("gptq_w4_sym", "auto_gptq", "W4A16"),
    _cell("gptq_w8_sym", "auto_gptq", "W8A16"),
    _cell("gptq_w4_asym", "auto_gptq", "W4A16", "--asym"),
    _cell("gptq_w4g32", "auto_gptq", "W4A16", "--group_size", "32"),
    _cell("gptq_w4_mixed", "auto_gptq", "W4A16", "--layer_config", MIXED),
    _cell("awq_sym", "auto_awq", "W4A16"),
    _cell("awq_asym", "auto_awq", "W4A16", "--asym"),
    _cell("ar_gptq_sym", "auto_round:auto_gptq", "W4A16"),
    _cell("ar_gptq_asym", "auto_round:auto_gptq", "W4A16", "--asym"),
    _cell("ar_awq_sym", "auto_round:auto_awq", "W4A16"),
    _cell("ar_awq_asym", "auto_round:auto_awq", "W4A16", "--asym"),
]


# The cells of the model with planted groups: every way of storing a zero point.
PLANTED = ("ar_w4_sym", "ar_w2_asym", "ar_w3_asym", "ar_w4_asym", "ar_gptq_asym", "gptq_w4_asym", "awq_asym")


def wanted(cell: Cell, model: str) -> bool:
    """Whether that cell is exported from that model."""
    return model != "planted" or cell.name in PLANTED


@dataclass(frozen=True)
class Reader:
    """Someone who loads a folder: the environment it runs in, the function of logits.py, what it is given.

    `groups` are the formats it is given; `cells`, when not empty, narrows them by name; `few` does so for
    the made models: a start of vLLM costs more than all else.
    """

    name: str
    venv: str
    how: str
    groups: tuple[str, ...]
    note: str
    cells: tuple[str, ...] = ()
    few: tuple[str, ...] = ()

    def takes(self, cell: Cell, model: str) -> bool:
        """Whether this reader is given that cell of that model at all."""
        named = self.few if self.few and model != "novelist" else self.cells
        return cell.group in self.groups and (not named or cell.name in named)


EVERY = ("auto_round", "auto_gptq", "auto_awq", "auto_round:auto_gptq", "auto_round:auto_awq")
# vLLM has CPU kernels for 4 bits only; the last row is here for the words it refuses with.
VLLM = (
    *("ar_w4_sym", "ar_w4_asym", "ar_w4g32", "ar_w4gm1", "ar_b4g64", "ar_w4_lmhead"),
    *("ar_gptq_sym", "ar_awq_asym", "gptq_w4_sym", "gptq_w4g32", "awq_sym", "awq_asym"),
    *("ar_w2_sym", "ar_w3_asym", "ar_w8_sym", "ar_w4_mixed", "ar_awq_sym", "ar_gptq_asym", "gptq_w2_sym"),
)
GPTQMODEL = ("gptq_w2_sym", "gptq_w4_sym", "gptq_w4_asym", "gptq_w8_sym", "gptq_w4_mixed")
BOTH = ("auto_gptq", "auto_awq")
READERS = [
    Reader("ours", "ours", "auto_round", EVERY, "stock transformers with this package"),
    Reader("peer", "peer", "auto_round", EVERY, "stock transformers with auto-round 0.16.1"),
    Reader("gptqmodel", "c_gptq", "gptqmodel", BOTH, "stock transformers, optimum, gptqmodel"),
    Reader(
        "gptqmodel.load", "c_gptq", "gptqmodel_own", ("auto_gptq",), "gptqmodel alone", GPTQMODEL, GPTQMODEL
    ),
    Reader("ort", "c_ort", "ort", BOTH, "onnxruntime-genai model builder, ONNX Runtime"),
    Reader("autoawq", "c_awq", "autoawq", ("auto_awq",), "AutoAWQ"),
    Reader("vllm", "c_vllm", "vllm", EVERY, "vLLM on a CPU", VLLM, ("ar_w4_sym", "gptq_w4_sym", "awq_asym")),
]
