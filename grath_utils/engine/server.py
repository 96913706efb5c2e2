"""Completions from a server that speaks OpenAI's completions protocol: vLLM, SGLang, llama.cpp's.

The server gets our own rendered prompts, as token ids where it takes them, and every setting of
the sampler, since servers differ in their defaults. It is believed no more than it has to be: the
name of its model, the length of each prompt in its tokens, and its answers to a few questions are
held against the policy here, which is loaded anyway, to be trained and to score.
"""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch

from grath_utils.engine.chat import end_ids, end_of_answer, render_chat
from grath_utils.engine.encoding import encode_apart, token_ids
from grath_utils.engine.generation import Completion, Order, Stop, common_prefix, generate
from grath_utils.engine.models import Policy, adapter_fingerprint
from grath_utils.engine.slices import plain_logits
from grath_utils.errors import GrathError, ModelError, UsageError, brief, reason_of
from grath_utils.files import fingerprint

KEY = "GRATH_SERVER_KEY"  # environment variable: sent as the server's API key
PAUSES = (0.5, 1, 2, 4, 8)  # seconds before each new try, where an error may pass
MAY_PASS = (408, 409, 425, 429, 500, 502, 503, 504)  # HTTP status
PATIENCE = 600.0  # seconds to wait for an answer; more than the slowest request in a full queue
CONTINUE = "Nothing finished is lost: run the same again, and it goes on from there"
# Asked once, greedily. Texts of other scripts make tokenizers differ.
PROBES = (
    "What is the capital of Australia?",
    "Why is the sky blue?",
    "How many legs does a spider have?",
    "Where do penguins live?",
    "What happens if you swallow chewing gum?",
    "Who wrote “Don Quijote”, and what does «naïve» or 東京 mean?",
)
PROBE_TOKENS = 24
FAR = 0.5  # nats, see check_answers


@dataclass
class Server:
    """A server that writes what a policy would write."""

    policy: Policy
    client: httpx2.Client
    url: str
    in_flight: int  # requests that are sent at once
    model: str = ""  # its name there
    takes_ids: bool = False

    def complete(self, prompts: Sequence[str], **options: Any) -> list[Completion]:
        """Return one completion for each rendered prompt; options are the fields of an ``Order``.

        A server's random numbers are its own: with the same seed another server draws otherwise.

        Raises:
            GrathError: the server does not answer, or not as it should.
        """
        if not prompts:
            return []
        order = Order(prompts=prompts, **options)
        tokenizer, listed = self.policy.tokenizer, self.policy.model.generation_config.eos_token_id
        settings = {
            "max_tokens": order.max_new_tokens,
            "stop_token_ids": sorted(end_ids(tokenizer, listed)),
            "temperature": order.temperature,
            "top_p": order.top_p,
            "top_k": order.top_k,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,  # vLLM's and SGLang's name
            "repeat_penalty": 1.0,  # llama.cpp's
        }
        if order.stop and order.stop.strings:
            settings["stop"] = list(order.stop.strings)

        def one(named: tuple[str, str]) -> tuple[str, str]:
            prompt, key = named
            own = int(fingerprint([order.seed, key])[:7], 16)
            return _cut(*self._complete(prompt, {**settings, "seed": own}), order.stop)

        names = order.keys or map(str, range(len(prompts)))
        asked = zip(prompts, names, strict=True)
        with ThreadPoolExecutor(self.in_flight) as pool:
            written = list(pool.map(one, asked))  # after an error, no more are sent
        ids = encode_apart(tokenizer, [text for text, _ in written])
        return [Completion(text, own, why) for (text, why), own in zip(written, ids, strict=True)]

    def _complete(self, prompt: str, settings: Mapping[str, Any]) -> tuple[str, str]:
        """Return the text after one prompt, and why it ended."""
        ids = token_ids(self.policy.tokenizer, prompt)
        body = {"model": self.model, "prompt": ids if self.takes_ids else prompt, **settings}
        answer = self.ask("completions", body)
        try:
            [choice], usage = answer["choices"], answer["usage"]
            text, reason = str(choice["text"]), choice["finish_reason"]
            read, wrote = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise GrathError(f"{self.url} sent no completion, but {brief(answer)}") from error
        if read != len(ids):
            raise ModelError(
                f'"{self.model}" at {self.url} reads a prompt as {read} tokens that are {len(ids)} '
                f"for {self.policy.name}: it has another tokenizer, or adds a token of its own. "
                "Serve the same model; a server that takes token ids adds nothing"
            )
        if reason == "length" and wrote < settings["max_tokens"]:
            raise GrathError(
                f"{self.url} broke a completion off after {wrote} of {settings['max_tokens']} "
                f"tokens: its context is shorter than the {read + settings['max_tokens']} tokens "
                "that are needed; start it with a longer one"
            )
        return text, reason

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the server's answer; wait for trouble that may pass, not for a UsageError."""
        method = "GET" if body is None else "POST"
        for pause in (*PAUSES, 0):
            try:
                answer = self.client.request(method, path, json=body)
                if answer.is_success:
                    kind = answer.headers.get("content-type", "")
                    return answer.json() if "json" in kind else answer.text
                said = textwrap.shorten(answer.text, 200, placeholder=" ...")
                trouble = f"status {answer.status_code}, {said}"
                if answer.status_code in (401, 403):
                    trouble += f"; its key belongs into the environment variable {KEY}"
                if answer.status_code not in MAY_PASS:
                    raise UsageError(f"{self.url} refused a request for {path}: {trouble}")
            except httpx2.ReadTimeout as error:
                raise GrathError(
                    f"{self.url} has not answered for {PATIENCE:.0f} s ({self.in_flight} requests "
                    "are sent at once). Look whether it is stuck; if it is only slow, lower "
                    f"pairs.batch_size. {CONTINUE}"
                ) from error
            except (httpx2.TransportError, ValueError) as error:
                trouble = reason_of(error)
            time.sleep(pause)
        raise GrathError(
            f"{self.url} does not answer ({trouble}; tried {len(PAUSES) + 1} times in "
            f"{sum(PAUSES):.0f} s). Start it again, or name it by pairs.server_url. {CONTINUE}"
        )


def connect(policy: Policy, url: str, model: str | None = None, *, in_flight: int = 64) -> Server:
    """Return a server that was found to serve the policy.

    ``model`` is the base model's name there; the only one that is served if none is given. A policy
    with an adapter is called ``NAME-HASH``, by a hash of the adapter.

    Raises:
        ModelError: it serves another model, or not this adapter.
        GrathError: it does not answer.
    """
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    key = os.environ.get(KEY)
    try:
        client = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(PATIENCE, connect=10),
            limits=httpx2.Limits(max_connections=in_flight),
        )
        if client.base_url.scheme not in ("http", "https"):
            raise httpx2.InvalidURL("it begins with no http:// or https://")
    except httpx2.InvalidURL as error:
        raise UsageError(f'"pairs.server_url" holds {url!r}: {reason_of(error)}') from error
    server = Server(policy, client, url, in_flight)
    server.model = served_name(server, model)
    ids = token_ids(policy.tokenizer, PROBES[0])
    with suppress(httpx2.TransportError):  # llama-cpp-python's server says no by status 500
        body = {"model": server.model, "prompt": ids, "max_tokens": 1}
        server.takes_ids = client.post("completions", json=body).is_success
    check_answers(server)
    return server


def served_name(server: Server, model: str | None) -> str:
    """Return the name by which the server serves the policy, loading its adapter if need be."""
    try:
        served = [str(each["id"]) for each in server.ask("models")["data"]]
    except (KeyError, TypeError) as error:
        raise GrathError(f"{server.url}/models lists no models") from error
    adapters, listed = server.policy.adapters, ", ".join(served) or "nothing"
    if model is None and len(served) != 1:
        raise ModelError(f"{server.url} serves {listed}: name the base by pairs.server_model")
    name = model or served[0]
    if name not in served:
        raise ModelError(f'{server.url} serves no "{name}" (pairs.server_model), but {listed}')
    if not adapters:
        return name
    if len(adapters) > 1:
        raise ModelError(
            f"{server.policy.name} has {len(adapters)} adapters on its base, and a server can put "
            "one there: use dpo.chain=continue, or pairs.backend=own"
        )
    folder = Path(adapters[0]).resolve()
    name = f"{name}-{adapter_fingerprint(folder)[:8]}"
    if name not in served:
        try:  # vLLM's way (with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)
            server.ask("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except UsageError as error:
            raise ModelError(
                f'{server.url} does not serve the adapter in {folder} as "{name}" and cannot load '
                f"it now ({reason_of(error)}). Load it by this name, and run the same again"
            ) from error
    return name


def check_answers(server: Server) -> None:
    """Ask a few questions, and hold the answers against the policy's own.

    Where an answer parts from the policy's, the policy says by how many nats it prefers its own
    next token. Measured on the default model, the mean over the questions is 0 for the same weights
    in float32, 0.08 in bfloat16, 0.04 for the 4-bit file that they come from and 0.28 for a file
    in Q4_K_M; it is 1.6 for weights rounded to NF4, and 2.0 for an adapter of 60 steps.
    """
    tokenizer = server.policy.tokenizer
    prompts = [render_chat(tokenizer, [{"role": "user", "content": each}]) for each in PROBES]
    theirs = server.complete(prompts, max_new_tokens=PROBE_TOKENS)
    ours = generate(server.policy, prompts, max_new_tokens=PROBE_TOKENS)
    nats = partings(server.policy, prompts, ours, theirs)
    if (mean := sum(nats) / len(nats)) > FAR:
        far = max(range(len(nats)), key=nats.__getitem__)
        raise ModelError(
            f'"{server.model}" at {server.url} does not write as {server.policy.name} does: of '
            f"{len(nats)} answers {nats.count(0.0)} are the same, and where they part ours is "
            f"{mean:.1f} nats more probable on average (up to {FAR} is rounding). To "
            f'"{PROBES[far]}" it answers {theirs[far].text[:60]!r}. Serve what the configuration '
            f"names: model, adapter and model.quantization={server.policy.config.quantization}"
        )


def partings(
    policy: Policy, prompts: Sequence[str], ours: Sequence[Completion], theirs: Sequence[Completion]
) -> list[float]:
    """Return for each prompt by how many nats the policy prefers its own token where two greedy
    completions part; 0 where they are the same."""
    tokenizer, nats = policy.tokenizer, []
    end = tokenizer.convert_tokens_to_ids(end_of_answer(tokenizer) or tokenizer.eos_token)
    for prompt, *pair in zip(prompts, ours, theirs, strict=True):
        a, b = ([*ids, end] for ids in encode_apart(tokenizer, [each.text for each in pair]))
        same = common_prefix([a, b])
        ids = torch.tensor([[*token_ids(tokenizer, prompt), *same]], device=policy.device)
        with torch.inference_mode():
            logits = plain_logits(policy.model, ids)[0, -1].float()
        nats.append(abs(float(logits[a[len(same)]] - logits[b[len(same)]])))
    return nats


def _cut(text: str, reason: str, stop: Stop | None) -> tuple[str, str]:
    """Return a text up to where its condition held first, and why it ended."""
    for found in re.finditer(re.escape(stop.trigger) or "(?s).", text) if stop else ():
        if stop.reached(text[: found.end()]):
            return text[: found.end()], "stop"
    return text, "length" if reason == "length" else "stop"
