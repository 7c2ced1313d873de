"""All-reduce of Shoal's rounds, hivemind and Gloo between real processes: seconds, bytes, error, bias.

    python tests/benchmarks/allreduce.py --peers 2,4,8 --mib 100 --codec int8,int4,onebit,fp32
        --against hivemind,gloo [--rounds 7] [--data gaussian|one-sided|heavy] [--json]

For each number of peers the systems take turns. All workers hold their input in memory when the parent
releases them at one instant; a round ends when the last of them holds the decoded mean in fp32. Shoal's time
is a whole round with mutual TLS, digests and commit (`allreduce_shoal.py`), and root_seconds_median what its
state root takes after that; the others' is the bare reduction (`allreduce_baselines.py`). bytes_per_peer is
what the loopback device carried in a round, divided by peers: the least over the rounds, for other traffic
can only add. Prints one line of JSON a row with --json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
from allreduce_harness import DATA
from allreduce_processes import Measured, Workers, measure

from shoal.protocol.admission import OwnerKey
from shoal.protocol.identity import Role

HERE = Path(__file__).parent
HIVEMIND = ("hivemind==1.1.12", "numpy<2.3", "torch==2.13.0", "setuptools")  # its 8 bits fail on newer numpy
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
CODECS_OF = {"hivemind": ("uint8", "fp32"), "gloo": ("fp32",)}


def loopback_bytes(network: Sequence[str] = ()) -> list[int]:
    """What all peers together have sent: the loopback device's counter, in the network they are in."""
    return [int(subprocess.check_output([*network, "cat", str(LOOPBACK)]))]


@contextlib.contextmanager
def own_network(wanted: bool) -> Iterator[list[str]]:
    """How to start a program in a network namespace of this process, or just in the usual one."""
    if not wanted:
        yield []
        return
    name = f"shoal-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)


def row(system: str, codec: str, peers: int, options: argparse.Namespace, found: Measured) -> dict[str, Any]:
    """A line of the report."""
    fields: dict[str, Any] = {
        "system": system,
        "codec": codec,
        "peers": peers,
        "mib": options.mib,
        "seconds_median": round(statistics.median(found.seconds), 4),
        "seconds_min": round(min(found.seconds), 4),
        "seconds_max": round(max(found.seconds), 4),
        "relative_error": found.closing[0]["relative_error"],
        "bias_in_std": found.closing[0]["bias_in_std"],
        "bytes_per_peer": min(sum(carried) for carried in found.wire_bytes) // peers,
        "data": options.data,
        "rounds": options.rounds,
        "seconds": [round(seconds, 4) for seconds in found.seconds],
        "load_average": round(os.getloadavg()[0], 2),
        "cpu_s_per_peer": round(statistics.median(parts["cpu_s"] for parts in found.parts), 3),
    }
    if system == "shoal":
        fields["root_seconds_median"] = round(statistics.median(p["root_s"] for p in found.parts), 4)
        fields["go_to_applied_median"] = round(statistics.median(p["round_s"] for p in found.parts), 4)
        fields["frame_bytes_per_peer"] = found.frame_bytes_per_peer(options.warm_up + options.rounds)
        fields["contributions_lost"] = sum(parts["lost"] for parts in found.parts)
        fields["rounds_failed"] = sum(closing["rounds_failed"] for closing in found.closing)
        fields["parts_skipped"] = sum(closing["parts_skipped"] for closing in found.closing)
    return fields


def hivemind_python(folder: Path | None) -> str:
    """The interpreter of hivemind's environment, made at the first use. Raises CalledProcessError."""
    folder = folder or Path(platformdirs.user_cache_dir("shoal")) / "benchmark-hivemind"
    python = folder / "bin" / "python"
    wanted = "import hivemind.averaging.allreduce, numpy; numpy.zeros(1)"
    if not python.exists() or subprocess.run([str(python), "-c", wanted], capture_output=True).returncode:
        print(f"making {folder} for hivemind ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", *HIVEMIND]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    return str(python)


def shoal_token() -> str:
    """A run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        owner = OwnerKey.create(Path(folder) / "owner", os.urandom(32), "benchmark", time.time())
        return owner.issue_token([Role.TRAINER], 3600.0, [], "benchmark", time.time()).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", default="2,4,8")
    parser.add_argument("--mib", type=int, default=100, help="of fp32 at every peer")
    parser.add_argument(
        "--codec", default="int8,int4,onebit,fp32", help="of Shoal; the others have their own"
    )
    parser.add_argument("--against", default="hivemind,gloo", help="or one of them, or nothing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--data", choices=DATA, default="gaussian")
    parser.add_argument(
        "--part-kib", type=int, default=0, help="part_bytes of the spec, instead of its default"
    )
    parser.add_argument(
        "--own-network", action="store_true", help="bytes without other programs'; needs root"
    )
    parser.add_argument("--environment", type=Path, help="where hivemind's environment is or shall be")
    parser.add_argument(
        "--require-all", action="store_true", help="exit 1 when a system could not be measured"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chosen = [("shoal", codec) for codec in options.codec.split(",") if codec]
    chosen += [
        (system, codec) for system in options.against.split(",") if system for codec in CODECS_OF[system]
    ]
    missing = 0
    for peers in map(int, options.peers.split(",")):
        for system, codec in chosen:
            try:
                line = one(system, codec, peers, options)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                missing += 1
                line = {
                    "system": system,
                    "codec": codec,
                    "peers": peers,
                    "mib": options.mib,
                    "error": str(error),
                }
            print(json.dumps(line) if options.json else table_row(line), flush=True)
    sys.exit(1 if missing and options.require_all else 0)


def one(system: str, codec: str, peers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one system."""
    script = "allreduce_shoal.py" if system == "shoal" else "allreduce_baselines.py"
    python = hivemind_python(options.environment) if system == "hivemind" else sys.executable
    with tempfile.TemporaryDirectory() as folder, own_network(options.own_network) as network:
        shared = {
            "system": system,
            "codec": codec,
            "peers": peers,
            "mib": options.mib,
            "data": options.data,
            "warm_up": options.warm_up,
            "folder": folder,
            "part_kib": options.part_kib,
            "host": "127.0.0.1",
            "hosts": ["127.0.0.1"] * peers,
            "token": shoal_token() if system == "shoal" else "",
        }
        configs = [{**shared, "rank": rank} for rank in range(peers)]
        with Workers([[*network, python, str(HERE / script)]] * peers, configs) as workers:
            found = measure(workers, options.warm_up, options.rounds, partial(loopback_bytes, network))
    return row(system, codec, peers, options, found)


def table_row(line: dict[str, Any]) -> str:
    """For people."""
    title = f"{line['system']:>9} {line['codec']:>7} {line['peers']:>2} peers"
    if "error" in line:
        return f"{title}  not measured: {line['error']}"
    return (
        f"{title}  {line['seconds_median']:7.3f} s ({line['seconds_min']:.3f} to {line['seconds_max']:.3f})"
        f"  {line['bytes_per_peer'] / 1e6:7.1f} MB a peer  error {line['relative_error']:.2e}"
        f"  bias {line['bias_in_std']:+.4f} std"
    )


if __name__ == "__main__":
    main()
