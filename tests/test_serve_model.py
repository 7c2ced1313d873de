"""`shoal serve-model`: a model of transformers' on two machines, asked by a third that has no file of it."""

from __future__ import annotations

import asyncio
import inspect
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tokenizers
import torch
from blake3 import blake3

from shoal.node.cli.serve_model import _serving_only
from shoal.node.demo.processes import PeerProcess, run_shoal
from shoal.node.hf import SwarmModelForCausalLM
from shoal.node.paths import CACHE_KEY
from shoal.node.signed_spec import SignedSpec
from shoal.node.tokenizers import METHOD, TokenizerReply, TokenizerRequest, serve_tokenizer, with_tokenizer
from shoal.protocol import limits
from shoal.protocol.errors import HardwareTooSmall, NetworkError, ShoalError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Channel, Stream
from shoal.training.checkpoint.hf_import import import_hf
from shoal.training.plan import make_plan
from shoal.training.spec import RunSpec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

START_S, PROMPT, TOKENS = 90.0, "def parse", 20
EVERYBODY = frozenset(Role)


def write_model(folder: Path) -> tuple[Any, Any]:
    """A small Qwen2 of random weights with a tokenizer of its own, as transformers saves them."""
    torch.manual_seed(0)
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer, library.decoder = (
        byte_level(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    library.train_from_iterator([inspect.getsource(inspect)], trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>")  # type: ignore[no-untyped-call]
        settings: dict[str, Any] = {
            "vocab_size": library.get_vocab_size(),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        model = AutoModelForCausalLM.from_config(Qwen2Config(**settings))  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_strangers_lend_machines_to_a_model_and_its_text_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as name:  # short, for the sockets in it
        folder = Path(name)
        model, tokenizer = write_model(folder / "model")
        shutil.copytree(folder / "model", folder / "other")
        with (folder / "other/tokenizer.json").open("a") as file:
            file.write("\n")
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0][ids.shape[1] :]

        def tune(token: str) -> None:
            """In the shape of Transformers, through the same strangers."""
            with SwarmModelForCausalLM.from_pretrained(join=token, data_dir=folder / "tuner") as remote:
                with torch.no_grad():
                    expected = model(ids).logits
                torch.testing.assert_close(remote(ids).logits, expected, rtol=0.0, atol=1e-4)
                remote.add_adapter(rank=2)
                remote(ids, labels=ids).loss.backward()
                assert all(parameter.grad is not None for parameter in remote.parameters())

        async def story() -> str:
            owner, lender = peers = [
                PeerProcess(name, folder / name, lambda peer, event: None) for name in ("owner", "lender")
            ]
            try:
                monkeypatch.setenv(CACHE_KEY, str(folder / "cache"))
                await owner.start("serve-model", str(folder / "model"), "--stages", "2", "--stage", "0")
                await owner.event("invitation", START_S)
                token = next((folder / "owner/data/owner").glob("*/join.token"))
                monkeypatch.setenv(CACHE_KEY, str(folder / "elsewhere"))
                await lender.start("join", f"@{token}")
                await lender.event("online", START_S)
                assert lender.stage == 1  # where it was needed
                data = str(folder / "owner/data")
                made = await run_shoal(
                    "token", "create", "--role", "inference", "--json", "--data-dir", data, timeout_s=START_S
                )
                asked = ["generate", str(made["token"]), "-p", PROMPT, "--max-new-tokens", str(TOKENS)]
                asked += ["--temperature", "0", "--json", "--data-dir", str(folder / "client"), "--draft"]
                # whether its guesses come in time is between two processes; what they gain: test_speculation
                done = await run_shoal(*asked, str(folder / "model"), timeout_s=START_S)
                assert done["drafted"] >= done["accepted"]
                with pytest.raises(ShoalError, match="cannot draft for this run: its tokenizer is another"):
                    await run_shoal(*asked, str(folder / "other"), timeout_s=START_S)
                await asyncio.to_thread(tune, str(made["token"]))
                status = await lender.status()
                assert status is not None
                assert status["training"]["sessions"]["positions"] > 0
                return str(done["text"])
            finally:
                await asyncio.gather(*(peer.stop() for peer in peers))

        assert asyncio.run(story()) == tokenizer.decode(theirs, skip_special_tokens=True)


def test_auto_takes_the_fewest_stages_that_fit(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    made = import_hf(tmp_path / "model", tmp_path / "store", 1)
    whole = _serving_only(made, None, "float32", 1 << 40)
    assert (whole.stages.count, whole.trains) == (1, False)
    needs = make_plan(whole).stages[0].memory.total
    halves = _serving_only(made, None, "float32", needs)
    assert halves.stages.count > 1
    full = make_plan(whole).stages[0].memory.serving
    assert make_plan(_serving_only(made, 1, "bfloat16", 0)).stages[0].memory.serving == full // 2
    assert make_plan(_serving_only(made, 1, "float32", 0, "int8")).stages[0].memory.serving < full // 3
    with pytest.raises(HardwareTooSmall, match="--memory"):
        _serving_only(made, None, "float32", 1000)


class Holders:
    """Peers that are asked for a tokenizer, each answering in its own way."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.me = self.network.transport(self._name(), EVERYBODY)

    def _name(self) -> PeerId:
        self.count = getattr(self, "count", 0) + 1
        return PeerId(f"12D3KooWt{self.count}".ljust(52, "1"))

    async def add(self, serve: Callable[[Any], None]) -> PeerId:
        name = self._name()
        transport = self.network.transport(name, EVERYBODY)
        serve(transport)
        await transport.start()
        return name


def told(content: bytes) -> Callable[[Any], None]:
    """A peer that answers with these bytes, whatever it is asked."""

    async def answer(stream: Stream) -> None:
        await stream.receive(TokenizerRequest)
        await stream.send(TokenizerReply(), content)

    return lambda transport: transport.serve(METHOD, answer, EVERYBODY)


def spec_of(content: bytes, path: Path) -> RunSpec:
    data = {"tokenizer": str(path), "tokenizer_blake3": blake3(content).hexdigest()}
    return RunSpec.model_validate({"data": data})


def test_a_tokenizer_comes_from_whoever_has_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_KEY, str(tmp_path / "cache"))
    content = b"{} the right one"
    (tmp_path / "right.json").write_bytes(content)
    theirs, mine = spec_of(content, tmp_path / "right.json"), spec_of(content, tmp_path / "other.json")
    (tmp_path / "other.json").write_bytes(b"another model's, under the name that the spec gives")

    async def main() -> RunSpec:
        holders = Holders()
        await holders.me.start()
        liar = await holders.add(told(b"rubbish"))
        flood = await holders.add(told(bytes(limits.TOKENIZER_BYTES + 1)))
        empty = await holders.add(lambda transport: serve_tokenizer(transport, lambda: None))
        with pytest.raises(NetworkError, match="nobody gave it"):
            await with_tokenizer(mine, holders.me, [liar, flood, empty])
        assert not list((tmp_path / "cache").rglob("*.json"))
        signed = SignedSpec(theirs, b"not looked at here")
        good = await holders.add(lambda transport: serve_tokenizer(transport, lambda: signed))
        opened = mock.Mock(wraps=holders.me.open)
        monkeypatch.setattr(holders.me, "open", opened)
        found = await with_tokenizer(mine, holders.me, [liar, good])
        assert [call.args[2] for call in opened.call_args_list] == [Channel.BULK] * 2, (
            "heartbeats go beside it"
        )
        assert await with_tokenizer(mine, holders.me, []) == found  # kept
        with pytest.raises(NetworkError, match="not the run's tokenizer"):
            await with_tokenizer(spec_of(b"a third", tmp_path / "x"), holders.me, [good])
        return found

    found = asyncio.run(main())
    assert Path(found.data.tokenizer).read_bytes() == content
