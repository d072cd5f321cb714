"""Scaling of a stream over the nodes of a local Ray cluster, each with one core: seconds, efficiency, equal bytes.

    python benchmarks/spread.py FOLDER --scheme W4A16 [--optimised] --nodes 1,2 --out spread.jsonl

The cluster is up, and its processes have imported torch, before the clock starts: nodes of a cluster stay up between
jobs. The driver's own share (planning, verifying) is part of the time. The output is removed after each run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path


def warm(seconds: float) -> int:
    """Import what a piece of work needs, and stay long enough that every core has to begin one."""
    import auto_round.spread  # noqa: F401

    time.sleep(seconds)
    return os.getpid()


def digest(folder: Path) -> str:
    """A hash of all files."""
    state = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        state.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 24):
                state.update(piece)
    return state.hexdigest()


def run(args: argparse.Namespace, nodes: int) -> dict[str, object]:
    """One job on `nodes` nodes."""
    import ray
    from ray.cluster_utils import Cluster

    from auto_round import AutoRound

    # Ray's processes give way to all others by default: on a machine that does anything else they would measure that.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    work = args.folder.parent / f"{args.folder.name}-spread"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        remote = ray.remote(num_cpus=1)(warm)
        while len(set(ray.get([remote.remote(5.0) for _ in range(nodes)]))) < nodes:
            continue
        shutil.rmtree(work, ignore_errors=True)
        begin = time.perf_counter()
        AutoRound(
            args.folder, model_free=True, scheme=args.scheme, enable_opt_rtn=args.optimised,
            max_shard_size=args.max_shard_size, distributed=cluster.address,
        ).quantize_and_save(work)  # fmt: skip
        seconds = time.perf_counter() - begin
        return {"nodes": nodes, "seconds": round(seconds, 2), "digest": digest(work)}
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--optimised", action="store_true")
    parser.add_argument("--nodes", default="1,2")
    parser.add_argument("--max-shard-size", default="100MB")
    parser.add_argument("--out", type=Path, default=Path("spread.jsonl"))
    args = parser.parse_args()
    for nodes in map(int, args.nodes.split(",")):
        about = {"source": args.folder.name, "scheme": args.scheme, "optimised": args.optimised}
        entry = {**about, **run(args, nodes)}
        print(entry, flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
