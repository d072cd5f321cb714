"""`verify`: open a checkpoint folder of any origin and report what a server would refuse or misread."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from auto_round.core.errors import FormatError, ModelError
from auto_round.core.plan import Plan
from auto_round.core.scheme import FLOAT
from auto_round.formats.base import format_named
from auto_round.formats.reading import Described, described
from auto_round.formats.rules import CHEAP, DEEP, Finding, Rule, Sheet, other_tensors
from auto_round.models.anatomy import Anatomy, anatomy, is_matrix
from auto_round.models.checkpoint import INDEX, Checkpoint, names_match, read_index
from auto_round.models.experts import SavedNames
from auto_round.models.load import skeleton


def verify(
    folder: str | Path, *, tp: Iterable[int] = (), deep: bool = True, trust_remote_code: bool = False
) -> list[Finding]:
    """What is wrong with the checkpoint in `folder`; empty when nothing is.

    tp: degrees of tensor parallelism it is to be served with. deep: read all codes too, not only scales. Raises
    ModelError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"verify: {folder} is no folder")
    try:
        config = json.loads((folder / "config.json").read_text())
        found = list(_files(folder, config))
        sheet = _sheet(folder, config, trust_remote_code=trust_remote_code)
    # A folder that cannot be read is a finding, not a failure of the check.
    except (OSError, ValueError) as error:  # FormatError and ModelError are ValueErrors
        where = "settings" if isinstance(error, FormatError) else "files"
        return [Finding(where, str(folder), str(error))]
    return found + apply(replace(sheet, tp=tuple(tp)), (*CHEAP, *DEEP) if deep else CHEAP)


def inspect(folder: Path, body: Anatomy, prefix: Mapping[str, str]) -> list[Finding]:
    """The cheap findings about a folder that was just written from the model `body`.

    prefix: what the stored tensors of a layer begin with, where it is not its name.
    """
    config, stored = json.loads((folder / "config.json").read_text()), Checkpoint(folder)
    said = described(config, body.layers, body.in_blocks())
    if said is None:
        return []
    modules = {name.rpartition(".")[0] for name in stored.infos}
    sheet = Sheet(
        config=config,
        infos=stored.infos,
        get=stored.get,
        body=body,
        prefix={name: prefix.get(name, name) for name in body.layers},
        plain={},
        modules=frozenset({*modules, *body.layers, *body.routers}),
        unlisted=(),
        said=replace(said, format=_resolved(said, body)),
    )
    return apply(sheet, [rule for rule in CHEAP if rule is not other_tensors])


def apply(sheet: Sheet, rules: Iterable[Rule] = CHEAP) -> list[Finding]:
    """All findings of `rules`; a layer that is not what its settings say is not read any further."""
    found: list[Finding] = []
    for rule in rules:
        # Reading codes in the wrong shape would add noise to a finding that already says what is wrong.
        if rule in DEEP and any(
            finding.rule in ("missing", "shape", "dtype", "described") for finding in found
        ):
            break
        found += rule(sheet)
    return found


def _files(folder: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Copies of the settings agree, and the index says what the shards hold."""
    for name in ("quantization_config.json", "quantize_config.json"):
        if (folder / name).is_file() and json.loads((folder / name).read_text()) != config.get(
            "quantization_config"
        ):
            yield Finding("settings", name, "differs from quantization_config in config.json")
    if not (folder / INDEX).is_file():
        return
    index = read_index(folder / INDEX)
    unread = sorted(
        path.name for path in folder.glob("model*.safetensors") if path.name not in index.values()
    )
    for name in unread:
        yield Finding(
            "index", name, f"named nowhere in {INDEX}: readers that take every file read old tensors"
        )
    stored = Checkpoint(folder)
    for name in stored.infos:
        where = stored.place(name).path.name
        if index.get(name) != where:
            yield Finding("index", name, f"is in {where}, but {INDEX} says {index.get(name, 'nothing')}")
    said = json.loads((folder / INDEX).read_text()).get("metadata", {}).get("total_size")
    size = sum(info.nbytes for info in stored.infos.values())
    if said is not None and said != size:
        yield Finding("index", INDEX, f"total_size is {said}, the tensors have {size} bytes")


def _sheet(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Sheet:
    """The checkpoint in `folder` against the model that its config.json describes."""
    tree, stored = skeleton(folder, trust_remote_code=trust_remote_code), Checkpoint(folder)
    body = anatomy(tree)
    prefix, plain = _names(tree, body, stored)
    config = _by_modules(config, prefix)
    said = described(config, body.layers, body.in_blocks())
    if said is not None and said.format.holds_embedding:
        body = body.with_embedding(tree)
        prefix, plain = _names(tree, body, stored)
        said = described(config, body.layers, body.in_blocks())
    said = said or Described(format_named("fake"), dict.fromkeys(body.layers, FLOAT))
    return Sheet(
        config=config,
        infos=stored.infos,
        get=stored.get,
        body=body,
        prefix=prefix,
        plain=plain,
        modules=frozenset(name for name, _ in tree.named_modules()) | body.layers.keys() | {*body.routers},
        unlisted=tuple(
            name for name, module in tree.named_modules() if is_matrix(module) and name not in body.layers
        ),
        said=replace(said, format=_resolved(said, body)),
    )


def _by_modules(config: Mapping[str, Any], prefix: Mapping[str, str]) -> dict[str, Any]:
    """`config` with its settings of layers under the names of the module tree, where it has them as checkpoints do."""
    layers = {stored: name for name, stored in prefix.items() if stored != name}
    about = config.get("quantization_config")
    if not layers or not isinstance(about, Mapping):
        return dict(config)
    found = dict(about)
    for key in ("extra_config", "ignore", "modules_to_not_convert"):
        said = about.get(key)
        if isinstance(said, Mapping):
            found[key] = {layers.get(name, name): value for name, value in said.items()}
        elif isinstance(said, list):
            found[key] = [layers.get(name, name) for name in said]
    return {**config, "quantization_config": found}


def _resolved(said: Described, body: Anatomy) -> Any:
    """The format, knowing all schemes."""
    plan = Plan(said.schemes, shapes=body.shapes(), base=FLOAT)
    return said.format.resolve(plan) if plan.quantized() else said.format


def _names(
    tree: nn.Module, body: Anatomy, stored: Checkpoint
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Layer -> prefix of its stored tensors; stored name -> shape of every other parameter of `tree`."""
    base, saved = str(tree.base_model_prefix), SavedNames(tree)
    modules = {name.rpartition(".")[0]: info for name, info in stored.infos.items()}

    def renamed(module: str) -> str:
        # By that of its weight: rules of renaming look at what follows a module's name.
        return saved.renamed(f"{module}.weight").removesuffix(".weight")

    prefix = {
        name: (names_match([name], modules, base, renamed) or {name: name})[name] for name in body.layers
    }
    of_layers = {layer.parameter for layer in body.layers.values()}
    plain: dict[str, tuple[int, ...]] = {}
    for name, tensor in tree.state_dict().items():
        if name not in of_layers:
            matched = names_match([name], stored.infos, base, saved.renamed) or {name: saved.renamed(name)}
            plain[matched[name]] = tuple(tensor.shape)
    return prefix, plain
