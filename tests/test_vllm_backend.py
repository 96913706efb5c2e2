"""The vLLM backend, against a stand-in for vLLM that runs our own tiny Llama: no GPU is needed.

The stand-in takes only what vLLM takes, ends a completion where vLLM ends it, and hands back what
vLLM hands back. It keeps a record of what it was asked.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_generation import PROMPTS
from test_pairs import DEFAULT, QUESTIONS, Killed, make, read_all

from grath_utils import pairs as pairs_module
from grath_utils.config import LoraConfig, ModelConfig, PairsConfig, load_config
from grath_utils.dpo import add_adapter
from grath_utils.errors import ConfigError, GrathError, UsageError
from grath_utils.generation import Stop, end_token_ids, generate, sequence_seed
from grath_utils.models import Policy, apply_adapters, load_base
from grath_utils.vllm_backend import CONTEXT, MEMORY_SHARE, VllmBackend

VLLM = PairsConfig(**{**vars(DEFAULT), "backend": "vllm"})


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert 0 <= self.temperature <= 2
        assert 0 < self.top_p <= 1
        assert self.top_k >= -1
        assert self.seed is None or 0 <= self.seed < 2**63


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """Decodes prompt after prompt, each token from the whole sequence: slow, and plainly right."""

    made: list[LLM] = []  # noqa: RUF012
    fails: Exception | None = None
    """Raised by the next one that is made."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        tokenizer_revision: str | None,
        trust_remote_code: bool,
        load_format: str,
        dtype: str,
        seed: int,
        max_model_len: int,
        gpu_memory_utilization: float,
        enable_prefix_caching: bool,
        generation_config: str,
        quantization: str | None = None,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
    ):
        if LLM.fails is not None:
            raise LLM.fails
        self.options = {k: v for k, v in locals().items() if k != "self"}
        self.policy = load_base(ModelConfig(name=model, dtype="float32", device="cpu"))
        self.asked: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.lora: LoRARequest | None = None
        self.running = True
        core = SimpleNamespace(shutdown=lambda: setattr(self, "running", False))
        self.llm_engine = SimpleNamespace(engine_core=core)
        LLM.made.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        assert self.running
        assert len(prompts) == len(sampling_params)
        if lora_request is not None and self.lora is None:
            assert self.options["enable_lora"]
            self.policy = apply_adapters(self.policy, [Path(lora_request.lora_path)])
        self.lora = lora_request
        self.asked += [prompt["prompt_token_ids"] for prompt in prompts]
        self.params += sampling_params
        with torch.inference_mode():
            answers = [
                self.answer(list(prompt["prompt_token_ids"]), params)
                for prompt, params in zip(prompts, sampling_params, strict=True)
            ]
        return [SimpleNamespace(outputs=[answer]) for answer in answers]

    def answer(self, ids: list[int], params: SamplingParams) -> SimpleNamespace:
        draws = torch.Generator()
        if params.seed is not None:
            draws.manual_seed(params.seed)
        written: list[int] = []

        def end(reason: str, cause: str | int | None = None) -> SimpleNamespace:
            # As in vLLM, the token that ended it is among the tokens, and never in the text.
            return SimpleNamespace(
                token_ids=written, text="unused", finish_reason=reason, stop_reason=cause
            )

        while True:
            logits = self.policy.model(torch.tensor([ids + written])).logits[0, -1]
            if params.temperature == 0:
                written.append(int(logits.argmax()))
            else:
                if params.top_k > 0:
                    logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
                probabilities = torch.softmax(logits / params.temperature, dim=-1)
                written.append(int(torch.multinomial(probabilities, 1, generator=draws)))
            if written[-1] in params.stop_token_ids:
                return end("stop", written[-1])
            text = self.policy.tokenizer.decode(written, skip_special_tokens=True)
            for string in params.stop:
                if string in text:
                    return end("stop", string)
            if len(written) == params.max_tokens:
                return end("length")


@pytest.fixture
def vllm(monkeypatch) -> type[LLM]:
    """Put the stand-in in the place of vLLM, with its plugin for bitsandbytes."""
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.inputs": {"TokensPrompt": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm_bnb_plugin": {},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "made", [])
    monkeypatch.setattr(LLM, "fails", None)
    return LLM


def on_gpu(policy: Policy, **changes: str) -> Policy:
    """Say that a policy is on a GPU, in 16 bits; the stand-in does not mind that it is not."""
    return replace(
        policy, config=replace(policy.config, device="cuda", dtype="bfloat16", **changes)
    )


@pytest.fixture
def policy(tiny_policy) -> Policy:
    return on_gpu(tiny_policy)


@pytest.fixture
def adapter(tiny_llama, tmp_path) -> Path:
    """The folder of an adapter of rank 12 that changes what the tiny Llama writes."""
    base = load_base(ModelConfig(name=str(tiny_llama), dtype="float32", device="cpu"))
    adapted = add_adapter(base, LoraConfig(r=12, alpha=24), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


# --- the same completions ------------------------------------------------------------------------


def test_greedy_completions_are_those_of_our_own_decoder(vllm, policy, tiny_policy):
    done = VllmBackend(policy).generate(PROMPTS, max_new_tokens=12)
    assert done == generate(tiny_policy, PROMPTS, max_new_tokens=12)
    (llm,) = vllm.made
    assert {p.temperature for p in llm.params} == {0.0}
    assert {p.seed for p in llm.params} == {None}
    assert {p.max_tokens for p in llm.params} == {12}


def test_order_is_kept_whatever_it_is(vllm, policy):
    backend = VllmBackend(policy)
    done = backend.generate(PROMPTS, max_new_tokens=6)
    assert backend.generate(PROMPTS[::-1], max_new_tokens=6) == done[::-1]
    assert len(vllm.made) == 1  # started once


def test_text_and_token_ids_are_the_same_prompt(vllm, policy):
    ids = [policy.tokenizer(p, add_special_tokens=False)["input_ids"] for p in PROMPTS]
    backend = VllmBackend(policy)
    assert backend.generate(ids, max_new_tokens=4) == backend.generate(PROMPTS, max_new_tokens=4)
    assert vllm.made[0].asked == ids + ids


def test_stop_strings_end_it_in_vllm_and_stay_in_the_text(vllm, policy, tiny_policy):
    free = generate(tiny_policy, PROMPTS, max_new_tokens=12)
    piece = policy.tokenizer.decode(free[0].token_ids[4:5])
    stop = Stop.at(piece, "\n")
    done = VllmBackend(policy).generate(PROMPTS, max_new_tokens=12, stop=stop)
    assert done == generate(tiny_policy, PROMPTS, max_new_tokens=12, stop=stop)
    assert done[0].finished == "stop"
    assert piece in done[0].text
    params = vllm.made[0].params[0]
    assert params.stop == [piece, "\n"]
    assert params.stop_token_ids == sorted(end_token_ids(policy))


def test_any_other_condition_is_applied_afterwards(vllm, policy, tiny_policy):
    stop = Stop(lambda text: len(text) > 5)
    done = VllmBackend(policy).generate(PROMPTS, max_new_tokens=12, stop=stop)
    assert done == generate(tiny_policy, PROMPTS, max_new_tokens=12, stop=stop)
    assert "stop" in {completion.finished for completion in done}
    assert vllm.made[0].params[0].stop == []


def test_the_end_token_ends_it_and_is_not_part_of_it(vllm, policy, tiny_policy, monkeypatch):
    (free,) = generate(tiny_policy, PROMPTS[:1], max_new_tokens=12)
    tiny_policy.model.generation_config.eos_token_id = [2, free.token_ids[5]]
    (done,) = VllmBackend(policy).generate(PROMPTS[:1], max_new_tokens=12)
    assert done.finished == "eos"
    assert done.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[5])]
    assert [done] == generate(tiny_policy, PROMPTS[:1], max_new_tokens=12)


@pytest.mark.parametrize(
    ("finish", "cause", "finished"),
    [("stop", None, "eos"), ("stop", "\n", "stop"), ("length", None, "length")],
)
def test_where_vllm_ends_it_earlier_its_reason_counts(
    vllm, policy, monkeypatch, finish, cause, finished
):
    answer = SimpleNamespace(token_ids=[5, 6], finish_reason=finish, stop_reason=cause)
    monkeypatch.setattr(vllm, "answer", lambda *_: answer)
    (done,) = VllmBackend(policy).generate(PROMPTS[:1])
    assert (done.token_ids, done.finished) == ((5, 6), finished)


def test_a_completion_that_was_broken_off_is_an_error(vllm, policy, monkeypatch):
    answer = SimpleNamespace(token_ids=[5], finish_reason="abort", stop_reason=None)
    monkeypatch.setattr(vllm, "answer", lambda *_: answer)
    with pytest.raises(GrathError, match=r"broke off a completion \(abort\)"):
        VllmBackend(policy).generate(PROMPTS[:1])


# --- sampling ------------------------------------------------------------------------------------


def test_each_sequence_draws_by_the_seed_and_its_key(vllm, policy):
    options = {"do_sample": True, "max_new_tokens": 8, "seed": 3}
    keys = [f"question {i}" for i in range(len(PROMPTS))]
    backend = VllmBackend(policy)
    together = backend.generate(PROMPTS, keys=keys, **options)
    assert [p.seed for p in vllm.made[0].params] == [sequence_seed(3, key) >> 1 for key in keys]
    assert backend.generate(PROMPTS[4:5], keys=keys[4:5], **options) == together[4:5]
    assert backend.generate(PROMPTS, keys=keys, **{**options, "seed": 4}) != together
    repeated = backend.generate(PROMPTS[:1] * 4, **options)
    assert len({c.token_ids for c in repeated}) > 1  # one prompt, four streams


def test_sampling_options_are_passed_on(vllm, policy):
    backend = VllmBackend(policy)
    options = {"do_sample": True, "max_new_tokens": 2, "temperature": 0.7}
    backend.generate(PROMPTS[:1], top_p=0.9, top_k=5, **options)
    backend.generate(PROMPTS[:1], top_k=0, **options)
    first, second = vllm.made[0].params
    assert (first.temperature, first.top_p, first.top_k) == (0.7, 0.9, 5)
    assert (second.top_p, second.top_k) == (1.0, -1)


# --- how vLLM is started, and ended ---------------------------------------------------------------


def test_vllm_is_started_with_the_policys_own_weights(vllm, policy, tiny_llama):
    VllmBackend(policy, seed=5).generate(PROMPTS[:1], max_new_tokens=1)
    options = vllm.made[0].options
    assert options["model"] == str(tiny_llama.resolve())
    assert (options["load_format"], options["quantization"]) == ("safetensors", None)
    assert (options["dtype"], options["seed"]) == ("bfloat16", 5)
    assert options["max_model_len"] == policy.max_length == 2048
    assert options["gpu_memory_utilization"] == MEMORY_SHARE
    assert options["enable_prefix_caching"]
    assert not options["trust_remote_code"]
    assert not options["enable_lora"]


def test_a_huge_context_is_not_asked_for(vllm, policy):
    policy.model.config.max_position_embeddings = 131072
    backend = VllmBackend(policy)
    assert backend.options["max_model_len"] == CONTEXT
    with pytest.raises(UsageError, match=f"context of {CONTEXT} tokens"):
        backend.generate(["a " * CONTEXT])


def test_nothing_is_started_before_the_first_prompt(vllm, policy):
    backend = VllmBackend(policy)
    assert backend.generate([]) == []
    backend.close()
    assert vllm.made == []


def test_close_ends_it_and_the_next_prompt_starts_another(vllm, policy):
    backend = VllmBackend(policy)
    backend.generate(PROMPTS[:1], max_new_tokens=1)
    backend.close()
    backend.close()
    assert not vllm.made[0].running
    backend.generate(PROMPTS[:1], max_new_tokens=1)
    assert len(vllm.made) == 2


def test_an_adapter_is_asked_for_with_every_prompt(vllm, tiny_policy, adapter):
    adapted = apply_adapters(tiny_policy, [adapter])
    assert adapted.adapters == (adapter,)
    expected = generate(adapted, PROMPTS, max_new_tokens=8)
    done = VllmBackend(on_gpu(adapted)).generate(PROMPTS, max_new_tokens=8)
    (llm,) = vllm.made
    assert llm.lora == LoRARequest("adapter", 1, str(adapter))
    assert llm.options["max_lora_rank"] == 16  # of rank 12, the next that vLLM has
    assert [c.token_ids for c in done] == [c.token_ids for c in expected]


def test_nf4_is_quantized_by_vllm_on_loading(vllm, policy):
    backend = VllmBackend(on_gpu(policy, quantization="nf4"))
    assert backend.options["quantization"] == "bitsandbytes"
    assert backend.options["load_format"] == "bitsandbytes"


# --- what cannot be ------------------------------------------------------------------------------


def test_without_vllm_it_says_what_to_do(policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install vllm .*pairs.backend=own"):
        VllmBackend(policy)


def test_without_a_gpu_it_says_what_to_do(vllm, tiny_policy):
    with pytest.raises(UsageError, match=r'needs an NVIDIA GPU.*on "cpu".*pairs.backend=own'):
        VllmBackend(tiny_policy)


@pytest.mark.parametrize("quantization", ["fp4", "int8"])
def test_other_quantizations_are_refused(vllm, policy, quantization):
    with pytest.raises(ConfigError, match=f"cannot load a model in {quantization}, only in nf4"):
        VllmBackend(on_gpu(policy, quantization=quantization))


def test_nf4_needs_the_plugin(vllm, policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm_bnb_plugin", None)
    with pytest.raises(UsageError, match="pip install vllm-bnb-plugin"):
        VllmBackend(on_gpu(policy, quantization="nf4"))


def test_adapters_that_vllm_cannot_take(vllm, policy, tiny_policy, adapter):
    two = on_gpu(apply_adapters(tiny_policy, [adapter, adapter]))
    with pytest.raises(UsageError, match=r"has 2 adapters.*merge_and_unload.*dpo.chain=continue"):
        VllmBackend(two)
    base = load_base(ModelConfig(name=policy.config.name, device="cpu"))
    in_memory = on_gpu(add_adapter(base, LoraConfig(r=2), seed=0))
    with pytest.raises(UsageError, match="an adapter that is in no folder"):
        VllmBackend(in_memory)


def test_adapters_are_computed_in_16_bits_and_up_to_a_rank(vllm, tiny_policy, adapter):
    adapted = on_gpu(apply_adapters(tiny_policy, [adapter]))
    with pytest.raises(ConfigError, match="model.dtype to bfloat16"):
        VllmBackend(replace(adapted, config=replace(adapted.config, dtype="float32")))
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"r": 12', '"r": 1024'))
    with pytest.raises(ConfigError, match=r"up to rank 512.*has 1024.*lora.r"):
        VllmBackend(adapted)


def test_failures_of_vllm_are_explained(vllm, policy, monkeypatch):
    vllm.fails = RuntimeError("Engine core initialization failed.\nSee above.")
    with pytest.raises(GrathError, match=r"cannot start with .*: Engine core .*Make room, or use"):
        VllmBackend(policy).generate(PROMPTS[:1])
    vllm.fails = None
    monkeypatch.setattr(vllm, "answer", lambda *_: 1 / 0)
    with pytest.raises(GrathError, match=r"vLLM failed with .*: division by zero"):
        VllmBackend(policy).generate(PROMPTS[:1])


def test_bad_input(vllm, policy):
    backend = VllmBackend(policy)
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        backend.generate(["a", ""])
    with pytest.raises(UsageError, match="impossible sampling"):
        backend.generate(["a"], do_sample=True, top_p=0.0)
    with pytest.raises(UsageError, match=r"up to 2.0, not 3.0: lower pairs.temperature"):
        backend.generate(["a"], do_sample=True, temperature=3.0)
    with pytest.raises(ConfigError, match='"pairs.backend" cannot be "vlm".*did you mean "vllm"'):
        load_config("cpu", "pairs.backend=vlm")


# --- pair generation -----------------------------------------------------------------------------


def test_pairs_are_those_of_our_own_decoder(vllm, policy, tiny_policy, tmp_path):
    """Greedy candidates only; the tiny model's babble passes when nothing is filtered."""
    greedy = {"candidates": 1, "filters": ("none",), "shots": 0, "max_new_tokens": 24}
    own = make(tiny_policy, tmp_path / "own", replace(DEFAULT, **greedy))
    other = make(policy, tmp_path / "vllm", replace(VLLM, **greedy))
    assert read_all(tmp_path / "vllm") == read_all(tmp_path / "own")
    assert 0 < own.pairs < own.questions  # both files have something in them
    assert (other.completions, other.tokens) == (own.completions, own.tokens)
    (llm,) = vllm.made
    assert not llm.running  # freed when the stage was over


def test_our_own_decoder_neither_needs_nor_starts_vllm(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    make(tiny_policy, tmp_path, replace(DEFAULT, filters=("none",)), QUESTIONS[:2])


def test_a_killed_run_frees_vllm_and_resumes(vllm, policy, tmp_path, monkeypatch):
    config = replace(VLLM, filters=("none",), shots=0)
    make(policy, tmp_path / "whole", config, QUESTIONS[:6])
    real = pairs_module.Journal.append

    def append(self, number, outcomes):
        if number == 1:
            raise Killed
        real(self, number, outcomes)

    with monkeypatch.context() as patch:
        patch.setattr(pairs_module.Journal, "append", append)
        with pytest.raises(Killed):
            make(policy, tmp_path / "killed", config, QUESTIONS[:6])
    assert [llm.running for llm in vllm.made] == [False, False]
    assert make(policy, tmp_path / "killed", config, QUESTIONS[:6]).resumed == 4
    assert read_all(tmp_path / "killed") == read_all(tmp_path / "whole")
    assert not any(llm.running for llm in vllm.made)


def test_a_journal_of_one_backend_is_not_continued_by_the_other(
    vllm, policy, tmp_path, monkeypatch
):
    config = replace(VLLM, filters=("none",), shots=0)
    with monkeypatch.context() as patch:
        patch.setattr(pairs_module, "_finish", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            make(policy, tmp_path, config, QUESTIONS[:4])
    with pytest.warns(UserWarning, match="other inputs"):
        report = make(policy, tmp_path, replace(config, backend="own"), QUESTIONS[:4])
    assert report.resumed == 0


def test_a_wrong_choice_is_refused_before_anything_is_written(vllm, tiny_policy, tmp_path):
    with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
        make(tiny_policy, tmp_path / "new", VLLM)
    assert not (tmp_path / "new").exists()
