"""Notebook 06: memory, several GPUs, and the cost of a backward pass."""

from __future__ import annotations

import functools

import numpy as np
import torch

from grath_utils.config import Config, load_config
from grath_utils.course.exercises.judging import Answer, exercise, finite_numbers, hold, hold_wanted
from grath_utils.engine.machine import quiet_transformers
from grath_utils.errors import did_you_mean
from grath_utils.scale import costs
from grath_utils.scale.shapes import shape_of

LONG_PAIR = 1024  # tokens; notebook 6
COUNTED = (2, 32)  # rows and tokens a row of the batch whose operations are counted; notebook 6


@exercise("06.easy", "(pairs without checkpointing, pairs with it)")
def micro_batch(answer: Answer) -> str:
    found = finite_numbers(answer.value, 2)
    config, device = load_config("paper-llama2"), costs.DEVICES["T4"]
    batch = config.dpo.batch_size
    hold(
        all(n >= 1 and batch % n == 0 for n in found),
        f"give two whole numbers that divide dpo.batch_size={batch}; other settings are refused.",
    )

    def needed(pairs: float, checkpointing: bool) -> float:
        size = {"dpo.micro_batch_size": int(pairs), "dpo.gradient_checkpointing": checkpointing}
        config = load_config("paper-llama2", size)
        return sum(costs.training_memory(config, device, pair_tokens=LONG_PAIR).values())

    sizes = [n for n in range(1, batch + 1) if batch % n == 0]
    wanted = [
        max((n for n in sizes if needed(n, kept) <= device.memory), default=0)
        for kept in (False, True)
    ]
    hold(found != wanted[::-1], "in the other order: without checkpointing first.")
    for value, right, kept in zip(found, wanted, (False, True), strict=True):
        which = "with" if kept else "without"
        hold(
            value <= right,
            f"{which} checkpointing, {value:.0f} pairs need {needed(value, kept) / 1e9:.1f} GB. A "
            f"T4 has {device.memory / 1e9:.0f} GB (of 1e9 bytes), and computes in float16.",
        )
        hold(value >= right, f"{which} checkpointing there is room for more pairs.")
    first, second = needed(wanted[0], False) / 1e9, needed(wanted[1], True) / 1e9
    return f"predicted to take {first:.1f} and {second:.1f} GB."


@exercise("06.medium", "(speed-up of the whole run, name of a stage)")
def eight_gpus(answer: Answer) -> str:
    speed_up, stage = answer.value
    config, found = load_config("paper-llama2"), float(speed_up)
    one, eight = (costs.estimate(config, costs.DEVICES[name]) for name in ("H100", "8xH100"))
    wanted = costs.total(one).seconds / costs.total(eight).seconds
    gains = {a.title: a.seconds / b.seconds for a, b in zip(one, eight, strict=True)}
    mean = float(np.mean(list(gains.values())))
    hold_wanted(
        found,
        wanted,
        0,
        (1 / wanted, "upside down: the time of one GPU over that of eight."),
        (mean, "this is the mean of the stages' own speed-ups. Long stages count for more: add up "
         "the times first."),
        relative=0.02,
        otherwise="another speed-up. The seconds of all stages of paper-llama2, on H100 and on "
        "8xH100.",
    )  # fmt: skip
    hold(stage in gains, f'no stage is called "{stage}"{did_you_mean(str(stage), gains)}.')
    hold(
        gains[stage] < 1.01 * min(gains.values()),
        f'"{stage}" becomes {gains[stage]:.1f} times as fast; another stage gains less.',
    )
    return f"the stage becomes {gains[stage]:.2f} times as fast: it mostly loads the model."


@exercise("06.hard", "(backward over forward with an adapter, the same with all weights trained)")
def backward_share(answer: Answer) -> str:
    first, second = finite_numbers(answer.value, 2)
    config = answer.run.config
    wanted = np.array([backward_over_forward(config, everything=x) for x in (False, True)])
    adapter, everything = wanted
    rows, tokens = COUNTED
    hold_wanted(
        [first, second],
        wanted,
        0.08,  # kernels differ in what is counted of attention
        (wanted[::-1], "in the other order: the adapter first."),
        (1 / wanted, "upside down: backward over forward."),
        (wanted + 1, "there is one forward pass too many in the backward's count. Is gradient "
         "checkpointing on, or the whole step in one counter?"),
        ([everything, second], "the first is the ratio of a base that is trained too. Freeze it: "
         "only the adapter may require a gradient."),
        ([first, adapter], "the second is the ratio of a frozen base. Let every weight require a "
         "gradient before the forward pass."),
        otherwise=f"at least one is another one. Take {rows} rows of {tokens} tokens, and a loss "
        "that every place of the output enters.",
    )  # fmt: skip
    return f"freezing the base saves {1 - (1 + adapter) / (1 + everything):.0%} of a step."


@functools.cache
def backward_over_forward(config: Config, *, everything: bool) -> float:
    """Count both passes of a model of the run's shape; no weight is stored, nothing computed."""
    import peft
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_of(config.model)
    sizes = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",  # of plain products, which are all counted
    )
    with torch.device("meta"):
        model: torch.nn.Module = LlamaForCausalLM(sizes)
        if not everything:
            targets = shape.lora_targets(config.lora)
            settings = peft.LoraConfig(r=config.lora.r, target_modules=targets)
            with quiet_transformers():
                model = peft.get_peft_model(model, settings)
        rows, tokens = COUNTED
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        mask = torch.zeros(rows, 1, tokens, tokens)  # given, or it would be looked for in the ids
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return backward.get_total_flops() / forward.get_total_flops()
