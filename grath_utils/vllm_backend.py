"""Completions by vLLM, for those who have it and an NVIDIA GPU: ``pairs.backend=vllm``.

:class:`VllmBackend` answers prompts as :func:`grath_utils.generation.generate` does: the same
prompts, limits, stop conditions and :class:`~grath_utils.generation.Completion`. What vLLM returns
is cut by our own rules, so that a completion means the same whoever computed it. Scoring remains
ours.

Two things differ. vLLM draws by its own numbers: a sample depends on the seed and the sequence's
key, as ours does, but is another one. And how vLLM batches changes the last bits of its logits, so
that a tie may fall otherwise when a run is repeated or resumed; where that must not be, set
``VLLM_BATCH_INVARIANT=1`` (newer GPUs, and slower).

vLLM is no requirement of this project, and is not imported unless it is asked for. It runs in a
process of its own, beside the policy that scores: both copies have to fit onto the GPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from grath_utils.artifacts import read_json
from grath_utils.errors import ConfigError, GrathError, UsageError
from grath_utils.generation import (
    Completion,
    Sampling,
    Stop,
    encode_prompts,
    end_token_ids,
    replay,
    sequence_seed,
)
from grath_utils.models import model_location

if TYPE_CHECKING:
    from grath_utils.models import Policy

MEMORY_SHARE = 0.5
"""Of the GPU's whole memory, for vLLM's weights, activations and cache together; the other half is
for our own copy of the model and what it scores."""

CONTEXT = 8192
"""Longest sequence at most: vLLM wants cache for one whole sequence, which is tens of gigabytes for
models made for 128k tokens. Our prompts have about a thousand."""

MAX_TEMPERATURE = 2.0  # vLLM refuses more
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the limits that vLLM can be started with
BITSANDBYTES = (
    "vllm_bnb_plugin",
    "vllm.model_executor.layers.quantization.bitsandbytes",  # built in before vLLM 0.28
)

INSTEAD = "or use pairs.backend=own, which works without it"


class VllmBackend:
    """vLLM with the weights of one policy; started by the first prompt, freed by :meth:`close`."""

    def __init__(self, policy: Policy, seed: int = 0):
        """Check that vLLM can run this policy here.

        Raises:
            UsageError: vLLM is not installed, there is no GPU, or the policy's adapters are not
                something that vLLM can take.
            ConfigError: a quantization or compute type that vLLM does not have.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        self.policy = policy
        self.context = min(policy.max_length, CONTEXT)
        self.options = engine_options(policy, self.context, seed)
        if not _installed("vllm"):
            raise UsageError(
                "pairs.backend=vllm needs the package vllm, which is not installed: pip install "
                "vllm (Linux; it brings its own torch, so best in a copy of this environment), "
                f"{INSTEAD}"
            )
        if "quantization" in self.options and not any(map(_installed, BITSANDBYTES)):
            raise UsageError(
                "model.quantization=nf4 with pairs.backend=vllm needs vLLM's plugin for "
                f"bitsandbytes: pip install vllm-bnb-plugin, {INSTEAD}"
            )
        self._llm: Any = None

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 100,
        stop: Stop | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 50,
        seed: int = 0,
        keys: Sequence[str] | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Return one completion for each prompt, in their order; see ``generation.generate``.

        Stop strings end a completion in vLLM itself; a condition that is more than strings does
        so only afterwards: what was written beyond it is dropped.

        Raises:
            UsageError: an empty prompt or one without room, or impossible sampling options.
            GrathError: vLLM cannot start, or fails.
        """
        sampling = Sampling(temperature if do_sample else 0.0, top_p, top_k)
        if sampling.temperature > MAX_TEMPERATURE:
            raise UsageError(
                f"vLLM samples with temperatures up to {MAX_TEMPERATURE}, not {temperature}: "
                f"lower pairs.temperature, {INSTEAD}"
            )
        encoded = encode_prompts(self.policy, prompts, max_new_tokens, self.context)
        if not encoded:
            return []
        keys = [str(i) for i in range(len(encoded))] if keys is None else keys
        llm = self._start()
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,  # -1: all tokens
            "max_tokens": max_new_tokens,
            "stop": list(stop.strings) if stop else [],
            "stop_token_ids": sorted(end_token_ids(self.policy)),
        }
        # One bit less than ours: vLLM keeps seeds as signed numbers.
        seeds = [sequence_seed(seed, key) >> 1 if do_sample else None for key in keys]
        folders = self.policy.adapters
        with _explained(f"vLLM failed with {self.policy.name}"):
            outputs = llm.generate(
                [TokensPrompt(prompt_token_ids=ids) for ids in encoded],
                [SamplingParams(**settings, seed=own) for own in seeds],
                use_tqdm=progress,
                lora_request=LoRARequest("adapter", 1, str(folders[-1])) if folders else None,
            )
        answers = [output.outputs[0] for output in outputs]
        written = [list(answer.token_ids) for answer in answers]
        completions = replay(self.policy, written, max_new_tokens=max_new_tokens, stop=stop)
        return [
            completion if completion.finished else replace(completion, finished=_reason(answer))
            for completion, answer in zip(completions, answers, strict=True)
        ]

    def _start(self) -> Any:
        if self._llm is None:
            torch.cuda.empty_cache()  # what torch only keeps in reserve is free for vLLM
            hint = (
                f". Its own messages are above; it wants {MEMORY_SHARE:.0%} of the GPU's memory, "
                f"beside the model that scores. Make room, {INSTEAD}"
            )
            with _explained(f"vLLM cannot start with {self.policy.name}", hint):
                from vllm import LLM

                self._llm = LLM(**self.options)
        return self._llm

    def close(self) -> None:
        """End vLLM's process, and with it all that it holds on the GPU."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        # One that has failed is gone already, and a later version may end with its last reference.
        with contextlib.suppress(Exception):
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.cuda.empty_cache()


def engine_options(policy: Policy, context: int, seed: int) -> dict[str, Any]:
    """Return what ``vllm.LLM`` is started with for a policy.

    Raises:
        UsageError: no GPU, or adapters that vLLM cannot put on the base model.
        ConfigError: a quantization or compute type that vLLM does not have.
    """
    config = policy.config
    if config.device != "cuda":
        raise UsageError(
            f'pairs.backend=vllm needs an NVIDIA GPU, and {policy.name} is on "{config.device}": '
            f"use a machine with one (model.device=cuda), {INSTEAD}"
        )
    options: dict[str, Any] = {
        "model": model_location(config.name),
        "revision": config.revision,
        "tokenizer_revision": config.revision,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "dtype": config.dtype,
        "seed": seed,
        "max_model_len": context,
        "gpu_memory_utilization": MEMORY_SHARE,
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # nothing from the model's file: each call says what it wants
    }
    if config.quantization == "nf4":
        # Quantized while it is loaded: NF4 with double quantization, as ours.
        options |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    elif config.quantization != "none":
        raise ConfigError(
            f"pairs.backend=vllm cannot load a model in {config.quantization}, only in nf4 or "
            f"unquantized: change model.quantization, {INSTEAD}"
        )
    return options | _adapter_options(policy)


def _adapter_options(policy: Policy) -> dict[str, Any]:
    folders = policy.adapters
    if not folders:
        if hasattr(policy.model, "peft_config"):
            raise UsageError(
                f"{policy.name} has an adapter that is in no folder, and vLLM reads it from one: "
                f"save it and load the policy by that folder's name, {INSTEAD}"
            )
        return {}
    if len(folders) > 1:
        raise UsageError(
            f"{policy.name} has {len(folders)} adapters, and vLLM takes one on top of the base. "
            "Merge first: policy = load_policy(NAME, quantization='none'), then write "
            "policy.model.merge_and_unload() and policy.tokenizer to a folder, each with "
            "save_pretrained, and start a run with model.name=FOLDER; dpo.chain=continue keeps to "
            f"one adapter, {INSTEAD}"
        )
    if policy.config.dtype == "float32":
        raise ConfigError(
            "vLLM computes adapters in 16 bits only: set model.dtype to bfloat16 or float16, "
            f"{INSTEAD}"
        )
    rank = int(read_json(folders[0] / "adapter_config.json")["r"])
    limit = next((limit for limit in LORA_RANKS if limit >= rank), None)
    if limit is None:
        raise ConfigError(
            f"vLLM takes adapters up to rank {LORA_RANKS[-1]}, and {folders[0]} has {rank}: lower "
            f"lora.r, {INSTEAD}"
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": limit}


def _reason(answer: Any) -> str:
    """Return why vLLM ended a completion that our own rules would have let go on.

    Raises:
        GrathError: it did not end by itself.
    """
    if answer.finish_reason == "length":
        return "length"
    if answer.finish_reason == "stop":
        return "stop" if isinstance(answer.stop_reason, str) else "eos"
    raise GrathError(f"vLLM broke off a completion ({answer.finish_reason}); run the command again")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


@contextlib.contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """Turn whatever vLLM raises (it has no error class of its own) into an error for people."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GrathError(f"{what}: {reason}{hint}") from error
