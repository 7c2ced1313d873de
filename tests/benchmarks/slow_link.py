"""Shoal's rounds on slow links: every peer in a network namespace of its own behind a token bucket.

    sudo python tests/benchmarks/slow_link.py --peers 4 --mib 32 --mbit 100 --codec int8,onebit [--json]

The peers' virtual wires end on a bridge in one more namespace; both ends of each are shaped (tc tbf), so a
peer sends and receives at most --mbit. The buckets count Ethernet, IP and TCP headers of every segment:
4.6 % more than what TCP carries, at an MTU of 1500. TCP runs Reno unless told: Cubic, the usual default, is
not open to namespaces on every kernel, and acts as Reno does at round trips this short. Namespaces have names
of this process and are removed at the end. A round is what `allreduce_shoal.py` says.

ideal_seconds is what a peer has to send, (k − 1)/k of its encoded vector to the owners and as much of means
to the others, over the bandwidth. wire_bytes_per_peer counts headers and acknowledgements as the devices do
(one header a super-segment), frame_bytes_per_peer what Shoal handed to TLS. Exit status 3: no root, ip or tc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from allreduce import HERE, shoal_token
from allreduce_harness import DATA
from allreduce_processes import Measured, Workers, measure
from allreduce_shoal import spec_of

from shoal.compression.registry import codec_for
from shoal.training.outer.parts import cut

NETWORK = "10.83.0"
QUEUE_S = 0.05  # of a token bucket, before it drops: a usual home router
BURST_BYTES = 128 * 1024  # the largest super-segment twice


def run(*command: str) -> str:
    """A command's output; ends the program where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def namespaces(peers: int, mbit: float, congestion: str) -> Iterator[list[str]]:
    """Names of the peers' namespaces, each with a shaped device `uplink` and the address NETWORK.rank+1."""
    hub, names = f"shoal-{os.getpid()}-hub", [f"shoal-{os.getpid()}-{rank}" for rank in range(peers)]
    made: list[str] = []
    try:
        for name in (hub, *names):
            run("ip", "netns", "add", name)
            made.append(name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={congestion}")
        run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", hub, "link", "set", "bridge", "up")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            run(
                "ip",
                "link",
                "add",
                "uplink",
                "netns",
                name,
                "type",
                "veth",
                "peer",
                "name",
                port,
                "netns",
                hub,
            )
            run("ip", "-n", name, "address", "add", f"{NETWORK}.{rank + 1}/24", "dev", "uplink")
            run("ip", "-n", hub, "link", "set", port, "master", "bridge")
            for namespace, device in ((name, "uplink"), (hub, port)):
                run("ip", "-n", namespace, "link", "set", device, "up")
                shape(namespace, device, mbit)
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def shape(namespace: str, device: str, mbit: float) -> None:
    """At most `mbit` out of a device."""
    limits = ["rate", f"{mbit:g}mbit", "burst", str(BURST_BYTES), "latency", f"{1000 * QUEUE_S:g}ms"]
    run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limits)


def sent_bytes(names: list[str]) -> list[int]:
    """What each peer's device has sent."""
    show = ("-json", "-statistics", "link", "show", "uplink")
    devices = [json.loads(run("ip", "-n", name, *show))[0] for name in names]
    return [int(device["stats64"]["tx"]["bytes"]) for device in devices]


def bucket_bytes(names: list[str]) -> int:
    """What the peers' buckets have counted so far, headers of every segment and all."""
    show = ("-json", "-statistics", "qdisc", "show", "dev", "uplink")
    return sum(int(json.loads(run("tc", "-n", name, *show))[0]["bytes"]) for name in names)


def arithmetic_bytes(config: dict[str, Any]) -> float:
    """What a peer has to send in a round by the codec's own account."""
    spec, peers = spec_of(config), config["peers"]
    size = config["mib"] * (1 << 20) // 4
    codec = codec_for(spec.compression.contribution, spec.compression.block)
    fragments = cut(size, spec.outer.part_bytes, spec.compression.block)
    encoded = sum(codec.encoded_bytes(part.count) for fragment in fragments for part in fragment.parts)
    total: float = 2 * (peers - 1) / peers * encoded
    return total


def one(codec: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one codec."""
    links = namespaces(options.peers, options.mbit, options.congestion)
    with tempfile.TemporaryDirectory() as folder, links as names:
        hosts = [f"{NETWORK}.{rank + 1}" for rank in range(options.peers)]
        shared = {
            "system": "shoal",
            "codec": codec,
            "peers": options.peers,
            "mib": options.mib,
            "data": options.data,
            "warm_up": options.warm_up,
            "folder": folder,
            "part_kib": options.part_kib,
            "upload": options.upload * 1e6 / 8 if options.upload else None,
            "hosts": hosts,
            "token": shoal_token(),
        }
        configs = [{**shared, "rank": rank, "host": host} for rank, host in enumerate(hosts)]
        worker = [sys.executable, str(HERE / "allreduce_shoal.py")]
        with Workers([["ip", "netns", "exec", name, *worker] for name in names], configs) as workers:
            found = measure(workers, options.warm_up, options.rounds, lambda: sent_bytes(names))
            headers = bucket_bytes(names) / sum(sent_bytes(names))
    return row(codec, arithmetic_bytes(configs[0]), headers, options, found)


def row(
    codec: str, arithmetic: float, headers: float, options: argparse.Namespace, found: Measured
) -> dict[str, Any]:
    """A line of the report; `headers` is what buckets count for a byte of the devices."""
    median_s = statistics.median(found.seconds)
    ideal_s = arithmetic / (options.mbit * 1e6 / 8)
    wire = statistics.median(sum(carried) / options.peers for carried in found.wire_bytes)
    busiest = statistics.median(max(carried) for carried in found.wire_bytes)
    frames = found.frame_bytes_per_peer(options.warm_up + options.rounds)
    fp32 = 2 * (options.peers - 1) / options.peers * options.mib * (1 << 20)
    return {
        "system": "shoal",
        "codec": codec,
        "peers": options.peers,
        "mib": options.mib,
        "mbit": options.mbit,
        "upload_mbit": options.upload,
        "seconds_median": round(median_s, 4),
        "seconds_min": round(min(found.seconds), 4),
        "seconds_max": round(max(found.seconds), 4),
        "ideal_seconds": round(ideal_s, 4),
        "seconds_over_ideal": round(median_s / ideal_s, 3),
        "arithmetic_bytes_per_peer": round(arithmetic),
        "frame_bytes_per_peer": frames,
        "frames_over_arithmetic": round(frames / arithmetic, 4),
        "frames_of_fp32": round(frames / fp32, 4),
        "wire_bytes_per_peer": round(wire),
        "wire_over_arithmetic": round(wire / arithmetic, 4),
        "bucket_over_arithmetic": round(headers * wire / arithmetic, 4),
        "busiest_over_mean": round(busiest / wire, 4),
        "contributions_lost": sum(parts["lost"] for parts in found.parts),
        "relative_error": found.closing[0]["relative_error"],
        "rounds": options.rounds,
        "seconds": [round(seconds, 4) for seconds in found.seconds],
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=32, help="of fp32 at every peer")
    parser.add_argument("--mbit", type=float, default=100.0, help="each way, of every peer")
    parser.add_argument("--codec", default="int8,onebit")
    parser.add_argument("--congestion", default="reno", help="control of TCP, as the kernel names it")
    parser.add_argument("--upload", type=float, default=0.0, help="Mbit/s, as in `shoal join --upload`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--data", choices=DATA, default="gaussian")
    parser.add_argument(
        "--part-kib", type=int, default=0, help="part_bytes of the spec, instead of its default"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        print(
            "namespaces and token buckets need root and iproute2 (ip, tc); run it with sudo", file=sys.stderr
        )
        sys.exit(3)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that namespaces are removed
    seconds: dict[str, float] = {}
    for codec in options.codec.split(","):
        line = one(codec, options)
        seconds[codec] = line["seconds_median"]
        print(json.dumps(line) if options.json else table_row(line), flush=True)
    if seconds.keys() >= {"int8", "onebit"}:
        ratio = round(seconds["int8"] / seconds["onebit"], 2)
        print(json.dumps({"int8_over_onebit": ratio}) if options.json else f"int8 takes {ratio} times onebit")


def table_row(line: dict[str, Any]) -> str:
    """For people."""
    return (
        f"{line['codec']:>7}  {line['seconds_median']:7.3f} s ({line['seconds_min']:.3f} to"
        f" {line['seconds_max']:.3f}), {line['seconds_over_ideal']:.2f} of ideal"
        f"  frames {line['frames_over_arithmetic']:.3f} of arithmetic,"
        f" wire {line['wire_over_arithmetic']:.3f}, {100 * line['frames_of_fp32']:.1f} % of fp32"
    )


if __name__ == "__main__":
    main()
