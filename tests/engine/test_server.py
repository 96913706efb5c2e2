"""Pairs written by a server: a small one in this process for the faults, llama.cpp's for the rest.

The second is not installed with the course. The environment variable GRATH_LLAMA_CPP names a Python
that has it (`pip install "llama-cpp-python[server]==0.3.36"` builds it, in minutes):

    GRATH_LLAMA_CPP=PYTHON python -m pytest tests/engine/test_server.py -s -k llama
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from grath_utils.config import LoraConfig, ModelConfig, PairsConfig, QuestionsConfig
from grath_utils.dpo.adapters import add_adapter
from grath_utils.engine import server
from grath_utils.engine.encoding import token_ids
from grath_utils.engine.generation import Stop, generate
from grath_utils.engine.models import Policy, adapter_fingerprint, apply_adapters, load_base
from grath_utils.errors import ConfigError, GrathError, ModelError, UsageError
from grath_utils.files import read_jsonl
from grath_utils.pairs.generate import generate_pairs
from grath_utils.pairs.modes import MODES, check_pairs_config
from grath_utils.pairs.questions import Question, load_questions

QUESTIONS = [Question(f"q{i}", f"Why does thing number {i} fall down?") for i in range(12)]
PAPER = PairsConfig(mode="paper", shots=1, batch_size=1, backend="server")  # chunks of four
PROMPTS = [
    f"<|im_start|>user\nthe {thing} in a" for thing in ("hat", "other", "air", "rain in the")
]


@dataclass
class Fake:
    """A server on the loopback address, and how it behaves; may be changed while it answers."""

    policy: Policy  # whose weights it serves
    names: list[str] = field(default_factory=lambda: ["tiny"])
    write: Callable[[str], str] | None = None  # writes what is not a probe, in the weights' place
    takes_ids: bool = True
    loads_adapters: bool = False
    extra_tokens: int = 0  # put before each prompt
    context: int = 10**6
    delay: float = 0.0
    troubles: list[int | str] = field(default_factory=list)  # next answers: status, or raw bytes
    dies_after: int = 10**9  # completions
    bodies: list[dict] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    url: str = ""

    def answer(self, path: str, body: dict | None) -> tuple[int, dict | str]:
        if self.troubles:
            trouble = self.troubles.pop(0)
            return (trouble, "in trouble") if isinstance(trouble, int) else (200, trouble)
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.names]}
        if path == "/v1/load_lora_adapter":
            if not self.loads_adapters:
                return 404, {"detail": "Not Found"}
            self.names.append(body["lora_name"])
            return 200, {"loaded": body["lora_path"]}
        if not self.takes_ids and not isinstance(body["prompt"], str):
            return 500, {"detail": "prompt must be a string"}  # as llama-cpp-python does
        if body["model"] not in self.names:
            return 404, {"message": "no such model"}
        self.bodies.append(body)
        return 200, self.complete(body)

    def complete(self, body: dict) -> dict:
        tokenizer, prompt = self.policy.tokenizer, body["prompt"]
        ids = token_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
        text = tokenizer.decode(ids)
        if self.write and not any(probe in text for probe in server.PROBES):
            written, reason = self.write(text), "stop"
        else:
            limit = min(body["max_tokens"], self.context - len(ids))
            [done] = generate(self.policy, [ids], max_new_tokens=limit, method="plain")
            written, reason = done.text, "length" if done.finished == "length" else "stop"
        for each in body.get("stop", ()):
            if each in written:
                written, reason = written.partition(each)[0], "stop"
        usage = {"prompt_tokens": len(ids) + self.extra_tokens}
        usage["completion_tokens"] = min(body["max_tokens"], self.context - len(ids))
        return {"choices": [{"text": written, "finish_reason": reason}], "usage": usage}


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(body)

        def do_GET(self) -> None:
            self.reply(None)

        def reply(self, body: dict | None) -> None:
            with lock:
                fake.busy += 1
                fake.busiest = max(fake.busy, fake.busiest)
            time.sleep(fake.delay)
            with lock:
                fake.busy -= 1
                dead = len(fake.bodies) >= fake.dies_after
                status, answer = (0, "") if dead else fake.answer(self.path, body)
            if not status:  # as a process that is killed: the connection ends
                self.close_connection = True
                return
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{httpd.server_port}"
    try:
        yield fake
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture
def fake(tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """A server of the tiny policy, and a client that does not wait long."""
    monkeypatch.setattr(server, "PAUSES", (0.01, 0.02))
    monkeypatch.setattr(server, "PATIENCE", 5.0)
    with serving(Fake(tiny_policy)) as fake:
        yield fake


# --- what it writes ------------------------------------------------------------------------------


@pytest.mark.parametrize("takes_ids", [True, False])
def test_greedy_completions_are_those_of_our_decoder(fake, tiny_policy, takes_ids):
    fake.takes_ids = takes_ids
    found = server.connect(tiny_policy, fake.url)
    assert (found.model, found.takes_ids) == ("tiny", takes_ids)
    theirs = found.complete(PROMPTS, max_new_tokens=12)
    ours = generate(tiny_policy, PROMPTS, max_new_tokens=12)
    assert [(c.text, c.finished) for c in theirs] == [(c.text, c.finished) for c in ours]
    assert found.complete([], max_new_tokens=12) == []


def test_every_setting_of_the_sampler_is_said(fake, tiny_policy):
    found = server.connect(tiny_policy, fake.url + "/v1/", "tiny")
    fake.bodies.clear()
    options = {"max_new_tokens": 4, "stop": Stop.at("\n"), "temperature": 0.9, "top_p": 0.95}
    found.complete(PROMPTS[:1] * 2, **options, seed=1, keys=["a", "b"])
    found.complete(PROMPTS[:1] * 2, **options, seed=1, keys=["a", "c"])
    found.complete(PROMPTS[:1], **options, seed=2, keys=["a"])
    body = fake.bodies[0]
    assert body["prompt"] == token_ids(tiny_policy.tokenizer, PROMPTS[0])
    wanted = {"max_tokens": 4, "stop": ["\n"], "stop_token_ids": [2], "min_p": 0.0, "top_k": 50}
    wanted |= {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
    assert body.items() >= wanted.items()
    seeds = [each["seed"] for each in fake.bodies]
    assert len(set(seeds)) == 4  # "a" of the same seed came twice
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_condition_cuts_where_it_first_holds(fake, tiny_policy):
    fake.write = lambda prompt: "one\ntwo\nthree\nfour"
    found = server.connect(tiny_policy, fake.url)
    three = Stop(lambda text: text.count("\n") == 2, "\n")
    for stop, text in ((three, "one\ntwo\n"), (Stop.at("\n"), "one"), (Stop.at("two"), "one\n")):
        [done] = found.complete(PROMPTS[:1], max_new_tokens=9, stop=stop)
        assert (done.text, done.finished) == (text, "stop")


def test_many_requests_are_in_flight_at_once(fake, tiny_policy):
    found = server.connect(tiny_policy, fake.url, in_flight=6)
    fake.delay, fake.busiest = 0.1, 0
    found.complete(PROMPTS * 6, max_new_tokens=1)
    assert fake.busiest == 6


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [503, 429, 500, "{broken"])
def test_trouble_that_passes_is_waited_for(fake, tiny_policy, trouble):
    found = server.connect(tiny_policy, fake.url)
    fake.troubles = [trouble, trouble]
    assert found.complete(PROMPTS, max_new_tokens=3) == found.complete(PROMPTS, max_new_tokens=3)
    assert not fake.troubles
    fake.troubles = [trouble] * 3
    with pytest.raises(GrathError, match="does not answer .* tried 3 times.*run the same again"):
        found.complete(PROMPTS[:1], max_new_tokens=3)


def change(fake: Fake, **behaviour: object) -> None:
    for name, value in behaviour.items():
        setattr(fake, name, value)


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ({"names": ["a", "b"]}, ModelError, "serves a, b: name the base by pairs.server_model"),
        ({"names": []}, ModelError, "serves nothing"),
        ({"extra_tokens": 1}, ModelError, "reads a prompt as .* another tokenizer"),
        ({"context": 60}, GrathError, "broke a completion off .* start it with a longer one"),
        ({"troubles": [401]}, UsageError, "refused .* status 401.* GRATH_SERVER_KEY"),
        ({"troubles": ['{"data": 3}']}, GrathError, "lists no models"),
        ({"troubles": ["[]"]}, GrathError, "lists no models"),
        ({"troubles": ["<html>"] * 3}, GrathError, "does not answer"),
    ],
)
def test_a_server_of_something_else_is_refused(fake, tiny_policy, behaviour, error, message):
    change(fake, **behaviour)
    with pytest.raises(error, match=message):
        server.connect(tiny_policy, fake.url)


def test_an_answer_that_is_no_completion_is_shown(fake, tiny_policy):
    found = server.connect(tiny_policy, fake.url)
    fake.troubles = ['{"choices": []}']
    with pytest.raises(GrathError, match="sent no completion, but {'choices': \\[\\]}"):
        found.complete(PROMPTS[:1], max_new_tokens=3)


def test_other_weights_are_found_out(fake, tiny_policy, tiny_llama):
    other = load_base(ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu"))
    with torch.no_grad():  # random weights are sure of nothing, so let both be
        tiny_policy.model.lm_head.weight.mul_(30)
        other.model.lm_head.weight.mul_(-30)
    assert server.connect(tiny_policy, fake.url)  # the fake has the very policy
    fake.policy = other
    with pytest.raises(ModelError, match="does not write as .* 0 are the same"):
        server.connect(tiny_policy, fake.url)


def test_another_name_is_refused(fake, tiny_policy):
    with pytest.raises(ModelError, match='serves no "big" .pairs.server_model., but tiny'):
        server.connect(tiny_policy, fake.url, "big")


@pytest.mark.parametrize("url", ["http://[::1", "nowhere", "ftp://here"])
def test_an_address_that_is_none_is_named(tiny_policy, url):
    with pytest.raises(UsageError, match="pairs.server_url"):
        server.connect(tiny_policy, url)


def test_nobody_there(tiny_policy, monkeypatch):
    monkeypatch.setattr(server, "PAUSES", (0.01,))
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(GrathError, match="does not answer .*refused.*run the same again"):
            server.connect(tiny_policy, f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_a_server_that_is_stuck_is_not_waited_for_forever(fake, tiny_policy):
    found = server.connect(tiny_policy, fake.url, in_flight=2)
    found.client.timeout = 0.3
    fake.delay = 1.0
    started = time.perf_counter()
    with pytest.raises(GrathError, match="has not answered .*lower pairs.batch_size.*run the same"):
        found.complete(PROMPTS * 20, max_new_tokens=3)
    assert time.perf_counter() - started < 5  # those that waited were not sent


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_policy, tmp_path) -> Policy:
    """A policy that says that it has an adapter (which changes nothing)."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    return replace(tiny_policy, adapters=(folder,))


def test_an_adapter_is_asked_for_by_its_own_name(fake, adapted, tiny_policy):
    fake.names = ["base", "other"]
    with pytest.raises(ModelError, match='does not serve the adapter in .* as "base-[0-9a-f]{8}"'):
        server.connect(adapted, fake.url, "base")
    fake.loads_adapters = True
    found = server.connect(adapted, fake.url, "base")
    assert re.fullmatch("base-[0-9a-f]{8}", found.model)
    assert fake.names == ["base", "other", found.model]
    fake.loads_adapters = False  # it is there now
    assert server.connect(adapted, fake.url, "base").model == found.model
    assert server.connect(tiny_policy, fake.url, "base").model == "base"


def test_an_adapter_on_a_merged_one_is_refused(fake, adapted):
    two = replace(adapted, adapters=adapted.adapters * 2)
    with pytest.raises(ModelError, match=r"2 adapters .* dpo.chain=continue"):
        server.connect(two, fake.url)


# --- pairs ---------------------------------------------------------------------------------------


def scripted(prompt: str) -> str:
    number = int(prompt.rsplit("number ", 1)[1].split()[0])
    return f"Correct answer: Force {number}.\nIncorrect answer: Magic {number}.\nand so on"


def write(policy: Policy, folder: Path, url: str) -> list[dict]:
    files = {"out": folder / "pairs.jsonl", "rejects": folder / "rejects.jsonl"}
    config = replace(PAPER, server_url=url)
    generate_pairs(policy, QUESTIONS, config, seed=0, progress=False, **files)
    return read_jsonl(files["out"])


def test_a_server_that_dies_costs_nothing_that_is_finished(fake, tiny_policy, tmp_path):
    fake.write = scripted
    whole = write(tiny_policy, tmp_path, fake.url)
    assert whole[3]["incorrect"] == "Magic 3."
    folder = tmp_path / "again"
    folder.mkdir()
    first = 1 + len(server.PROBES)  # may a prompt be ids, and is it the right model
    fake.dies_after = len(fake.bodies) + first + 6
    with pytest.raises(GrathError, match="does not answer .*goes on from there"):
        write(tiny_policy, folder, fake.url)
    assert [path.name for path in folder.iterdir()] == ["pairs.jsonl.journal"]
    with serving(Fake(tiny_policy, write=scripted)) as restarted:  # at another address
        assert write(tiny_policy, folder, restarted.url) == whole
        assert len(restarted.bodies) == first + 8  # one chunk of three was finished


@pytest.mark.parametrize("settings", [{"server_url": None}, {"server_url": "u", "backend": "own"}])
def test_backend_and_address_belong_together(settings):
    with pytest.raises(ConfigError, match="pairs.server_url"):
        check_pairs_config(replace(PAPER, **settings))


# --- llama.cpp's own server ----------------------------------------------------------------------

# Rows of v are in one order everywhere; a GGUF has those of q and k in another.
LORA = LoraConfig(r=4, alpha=8, targets=("v_proj",))


@dataclass
class Llama:
    """llama-cpp-python's server with the default model, and an adapter under its name."""

    url: str
    adapter: Path
    process: subprocess.Popen


@pytest.fixture(scope="module")
def llama(tmp_path_factory, default_policy) -> Iterator[Llama]:
    python = os.environ.get("GRATH_LLAMA_CPP")
    if not python:
        pytest.skip("GRATH_LLAMA_CPP names no Python with llama-cpp-python")
    from grath_utils.engine.course_models import COURSE_MODELS

    folder = tmp_path_factory.mktemp("llama")
    file, course = folder / "q4_1.gguf", COURSE_MODELS["tiny"]
    course.sources[0].fetch(file, course.size)
    for kind in ("BF16", "F32"):  # the very weights that we have, then in a dtype without rounding
        source, file = file, folder / f"{kind}.gguf"
        script = ROOT / "tests" / "benchmarks" / "llama.py"
        subprocess.run([python, script, "quantize", source, file, kind], check=True)
    adapter = make_adapter(default_policy, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    name = f"f32-{adapter_fingerprint(adapter)[:8]}"
    models = [
        {"model": str(folder / "F32.gguf"), "model_alias": "f32"},
        {"model": str(folder / "q4_1.gguf"), "model_alias": "q4_1"},
        {"model": str(folder / "F32.gguf"), "model_alias": name, "lora_path": str(folder / "lora")},
        {"model": str(folder / "F32.gguf"), "model_alias": f"q4_1{name[3:]}"},  # without it: wrong
    ]
    settings = {"host": "127.0.0.1", "port": port, "models": [each | common for each in models]}
    (folder / "server.json").write_text(json.dumps(settings))
    command = [python, "-m", "llama_cpp.server", "--config_file", folder / "server.json"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Llama(f"http://127.0.0.1:{port}", adapter, process)
    finally:
        process.kill()
        process.wait()


def make_adapter(policy: Policy, folder: Path) -> Path:
    """Write an adapter that changes every answer, for us and (as ``lora``) for llama.cpp."""
    from gguf import GGUFWriter
    from safetensors.torch import load_file, save_file

    adapted = add_adapter(load_base(policy.config), LORA, seed=0)
    adapted.model.save_pretrained(folder / "adapter")
    weights = folder / "adapter" / "adapter_model.safetensors"
    matrices = load_file(weights)
    generator = torch.Generator().manual_seed(0)
    for name, matrix in matrices.items():
        if "lora_B" in name:
            matrix.copy_(0.4 * torch.randn(matrix.shape, generator=generator))
    save_file(matrices, weights)
    writer = GGUFWriter(folder / "lora", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", LORA.alpha)
    for name, matrix in matrices.items():
        layer, which = re.search(r"layers\.(\d+)\..*lora_([AB])", name).groups()
        writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_{which.lower()}", matrix.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "adapter"


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("model", "same", "far"), [("f32", 0.9, 0.01), ("q4_1", 0.3, 0.5)])
def test_llama_writes_what_our_decoder_writes(llama, default_policy, model, same, far):
    questions = load_questions(QuestionsConfig(limit=12), 0).questions
    config = PairsConfig(mode="paper", backend="server", server_url=llama.url, server_model=model)
    write = MODES["paper"].writer
    ours = write(default_policy, PairsConfig(mode="paper"), 0).complete("pair", questions)
    writer = write(default_policy, config, 0)
    theirs = writer.complete("pair", questions)
    prompts = [writer.prompt(question, "pair") for question in questions]
    nats = server.partings(default_policy, prompts, ours, theirs)
    equal = sum(a.text == b.text for a, b in zip(ours, theirs, strict=True))
    print(f"\n{model}: {equal} of {len(questions)} completions are the same")
    for a, b, each in zip(ours, theirs, nats, strict=True):
        if a.text != b.text:
            at = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(a.text, b.text)))  # noqa: B905
            rest = " or ".join(repr(text[at : at + 30]) for text in (a.text, b.text))
            print(f"  {each:.3f} nats after {a.text[:at][-30:]!r}: {rest}")
    assert equal >= same * len(questions)
    assert max(nats) <= far


@pytest.mark.model
@pytest.mark.slow
def test_llama_serves_an_adapter_by_its_name(llama, default_policy):
    adapted = apply_adapters(load_base(default_policy.config), [llama.adapter])
    found = server.connect(adapted, llama.url, "f32")
    assert found.model == f"f32-{adapter_fingerprint(llama.adapter)[:8]}"
    prompts = ["The capital of France is", "Once upon a time", "Water boils at"]
    theirs = [done.text for done in found.complete(prompts, max_new_tokens=12)]
    assert theirs == [done.text for done in generate(adapted, prompts, max_new_tokens=12)]
    assert theirs != [done.text for done in generate(default_policy, prompts, max_new_tokens=12)]
    with pytest.raises(ModelError, match="does not write as"):  # the name is right, the model not
        server.connect(adapted, llama.url, "q4_1")


@pytest.mark.model
@pytest.mark.slow
def test_llama_of_another_model_or_killed_is_named(llama, tiny_policy, monkeypatch):
    """Last, for it ends the server; a policy of another kind is refused before."""
    with pytest.raises(ModelError, match="reads a prompt as .* tokens"):
        server.connect(tiny_policy, llama.url, "f32")
    monkeypatch.setattr(server, "PAUSES", (0.1, 0.1))
    llama.process.kill()
    with pytest.raises(GrathError, match="does not answer .*refused"):
        server.connect(tiny_policy, llama.url, "f32")
