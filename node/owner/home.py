"""The owner's folder of one run: root key, signed spec, tokens and the addresses that new tokens carry.

`shoal up` makes it on first use and keeps the addresses fresh; `shoal token` works from it beside
the daemon or without one. All files are private. Blocking: called before the loop starts or off it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.node.paths import run_folder
from shoal.node.signed_spec import SignedSpec
from shoal.protocol import limits
from shoal.protocol.admission import JoinToken, OwnerKey
from shoal.protocol.errors import UsageError
from shoal.protocol.identity import Role
from shoal.protocol.private_files import read_private, write_private
from shoal.training.spec import RunSpec

OWNER_TOKEN_TTL_S = 365 * 86400.0  # the owner's own peer
VOLUNTEER_TTL_S = 7 * 86400.0
_KEY, _OWN_TOKEN, _ADDRESSES = "owner.key", "owner.token", "addresses.json"
_ADDRESSES_BYTES = 64 * limits.KIB


@dataclass(frozen=True)
class OwnerHome:
    """One run's folder under `<root>/owner`."""

    folder: Path
    key: OwnerKey
    spec: SignedSpec

    @classmethod
    def of_run(cls, root: Path, spec: RunSpec, now: float) -> OwnerHome:
        """The home of this spec's run; made, with a new root key, on first use."""
        folder = run_folder(root / "owner", spec.run_id())
        if (folder / _KEY).exists():
            return cls.load(folder)
        key = OwnerKey.create(folder, spec.run_id(), spec.run.name, now)
        signed = SignedSpec.sign(spec, key)
        signed.save(folder)
        return cls(folder, key, signed)

    @classmethod
    def load(cls, folder: Path) -> OwnerHome:
        """Raises StorageError for what is missing or damaged."""
        key = OwnerKey.load(folder)
        signed = SignedSpec.load(folder)
        if signed is None:  # a crash between the two files of the first use
            raise UsageError(
                f"{folder} holds a key but no spec; run `shoal up run.toml` again after removing it"
            )
        return cls(folder, key, signed)

    @classmethod
    def choose(cls, root: Path, run: str | None) -> OwnerHome:
        """The home that `--run` names (its name or the start of its id), or the only one there is."""
        homes = [cls.load(path.parent) for path in sorted((root / "owner").glob(f"*/{_KEY}"))]
        wanted = [home for home in homes if run is None or home.is_called(run)]
        if len(wanted) == 1:
            return wanted[0]
        known = ", ".join(f"{home.key.run_name} ({home.key.run_id.hex()[:8]})" for home in homes)
        if not homes:
            raise UsageError(f"no run was started from {root}\nstart one with: shoal up run.toml")
        raise UsageError(
            f"{'no' if run else 'more than one'} run matches; there are: {known}\nchoose with --run"
        )

    def is_called(self, run: str) -> bool:
        """Whether `run` is this run's name or the start of its id."""
        return self.key.run_name == run or self.key.run_id.hex().startswith(run)

    def own_token(self, now: float) -> JoinToken:
        """The token of the owner's own peer, issued once and again when a tenth of its life is left."""
        path = self.folder / _OWN_TOKEN
        data = read_private(path, limits.TOKEN_CHARACTERS)
        if data is not None:
            token = JoinToken.parse(data.decode())
            if token.not_after - now > OWNER_TOKEN_TTL_S / 10:
                return token
        token = self.key.issue_token({Role.OWNER, Role.TRAINER}, OWNER_TOKEN_TTL_S, (), "owner", now)
        write_private(path, token.encode().encode())
        return token

    def issue(self, roles: Sequence[Role], ttl_s: float, name: str, now: float) -> JoinToken:
        """A token for somebody else, with the addresses known now. UsageError before the first `up`."""
        return self.key.issue_token(roles, ttl_s, self.addresses(), name, now)

    def addresses(self) -> tuple[str, ...]:
        """Where joiners find the swarm, as the daemon last wrote them."""
        data = read_private(self.folder / _ADDRESSES, _ADDRESSES_BYTES)
        if data is None:
            raise UsageError("this run has no address yet\nstart it first: shoal up run.toml")
        return tuple(str(address) for address in json.loads(data)["bootstrap"])

    def keep_addresses(self, bootstrap: Sequence[str]) -> None:
        """Remember where the swarm is found, for tokens to come."""
        write_private(self.folder / _ADDRESSES, json.dumps({"bootstrap": list(bootstrap)}).encode())

    def invitation(self, now: float) -> tuple[Path, str]:
        """A fresh trainer token for the first volunteer: the private file it lies in, and its text."""
        text = self.issue((Role.TRAINER,), VOLUNTEER_TTL_S, "first invitation", now).encode()
        path = self.folder / "join.token"
        write_private(path, text.encode())
        return path, text
