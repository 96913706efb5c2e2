"""From text to token ids: every kind of tokenizer, with ids worked out by hand.

The tokenizers are tiny, and built as those of the families are: what stands at the start of a text,
whether a space stands before its first word, what the chat template writes. The question is "Why?",
the answers are "So." and "No.".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers import PreTrainedTokenizerFast as Fast

from grath_utils.config import ModelConfig
from grath_utils.dpo.data import tokenize_pair
from grath_utils.engine.chat import end_ids, render_chat
from grath_utils.engine.encoding import Request, encode_requests, encode_texts, start_ids, token_ids
from grath_utils.engine.generation import generate
from grath_utils.engine.models import Policy, load_base
from grath_utils.engine.scoring import score_completions
from grath_utils.errors import ModelError, ScoringError
from grath_utils.pairs.generate import Pair
from grath_utils.pairs.prompts import (
    own_demonstrations,
    pair_messages,
    training_prompt,
    training_request,
)

PAIR = Pair("p", "Why?", "So.", "No.", 0)

# A byte-level vocabulary (Ġ is a space, Ċ the end of a line). Special tokens follow from 30 on.
WORDS = {
    **{"<unk>": 0, "Why": 1, "?": 2, "So": 3, ".": 4, "No": 5, "Q": 6, ":": 7, "ĠWhy": 8, "A": 9},
    **{"ĠSo": 10, "ĠNo": 11, "Ċ": 12, "user": 13, "assistant": 14, "User": 15, "Assistant": 16},
    **{"system": 17, "26": 18, "ĠJul": 19, "Ġ2024": 20, "ĊĊ": 21, "final": 22},
}
# A SentencePiece vocabulary (▁ is a space). Special tokens follow from 25 on.
PIECES = {
    **{
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        "▁": 3,
        "▁Q": 4,
        ":": 5,
        "▁Why": 6,
        "?": 7,
        "\n": 8,
        "A": 9,
    },
    **{"▁So": 10, ".": 11, "▁No": 12, "▁[INST]": 13, "▁[/INST]": 14, "So": 15, "No": 16, "Why": 17},
    **{"Q": 18, "▁<|user|>": 19, "<|assistant|>": 20, "user": 21, "model": 22, "▁USER:": 23},
    **{"▁ASSISTANT:": 24},
}
SPACES = normalizers.Replace(" ", "▁")


def byte_level(
    specials: Sequence[str], start: str = "$A", *, lines: str = "", **options: str
) -> Fast:
    """Make a tokenizer like GPT-2's and its heirs'; ``start`` is what it writes around a text.

    Line breaks before a word stand alone, or ``together`` (Llama 3).
    """
    raw = Tokenizer(models.WordLevel(WORDS | {s: 30 + i for i, s in enumerate(specials)}, "<unk>"))
    words = pre_tokenizers.Split(Regex(r"\n+| ?\w+|[^\w\s]"), "isolated")
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not lines)
    raw.pre_tokenizer = pre_tokenizers.Sequence([words, split]) if lines else split
    raw.decoder = decoders.ByteLevel()
    return _fast(raw, specials, start, options)


def sentence_piece(
    specials: Sequence[str],
    start: str = "$A",
    *,
    space: str = "every",
    rstrip=False,
    **options: str,
) -> Fast:
    """Make a tokenizer like Llama 2's: a space is put before ``every`` stretch between special
    tokens (Llama 2), before the ``first`` one if it begins the text (Mistral), or never (Gemma)."""
    raw = Tokenizer(models.Unigram([(piece, -1.0) for piece in PIECES], unk_id=0))
    if space == "first":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        before = [normalizers.Prepend("▁")] if space == "every" else []
        raw.normalizer = normalizers.Sequence([*before, SPACES])
    return _fast(raw, [*options.pop("known", ["<s>", "</s>"]), *specials], start, options, rstrip)


def _fast(
    raw: Tokenizer, specials: Sequence[str], start: str, options: dict, rstrip: bool = False
) -> Fast:
    raw.add_special_tokens([AddedToken(token, special=True, rstrip=rstrip) for token in specials])
    written = [(token, raw.token_to_id(token)) for token in start.split() if token != "$A"]
    raw.post_processor = TemplateProcessing(single=start, special_tokens=written)
    template = options.pop("chat_template", None)
    tokenizer = Fast(tokenizer_object=raw, unk_token="<unk>", **options)
    tokenizer.chat_template = template
    return tokenizer


# The families' templates, by their structure.
EACH = "{% for m in messages %}"
CHATML = EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nNo.<|im_end|>\n{% endif %}"
    + CHATML
    + OPENS
)
THINKS = (
    EACH + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ strftime_now('%d %b %Y') }}<|eot_id|>"
    + EACH
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>" + EACH + "<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GPT_OSS = (
    EACH + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
ZEPHYR = (
    EACH + "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALTERNATES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
)
LLAMA_2 = (
    ALTERNATES + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + ALTERNATES + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    + ALTERNATES
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}USER: {{ m.content }}"
    "{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

BLANK_LINE = (  # one token at the end of a text, two before a word
    EACH + "{% if m.role == 'user' %}User: {% endif %}{{ m.content }}"
    "{% if m.role == 'user' %}{{ '\n\n' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
ENDS_IN_A_SPACE = (
    EACH + "{% if m.role == 'user' %}USER: {{ m.content }}"
    "{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
)

LINES = [15, 7, 8, 2, 12, 16, 7]  # User: Why?\nAssistant:
ASKS = [6, 7, 8, 2, 12, 9, 7]  # Q: Why?\nA:
SP_ASKS = [4, 5, 6, 7, 8, 9, 5]  # the same, with a space before Q


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer, and the ids that it has to give."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat: list[int]  # the prompt, in the chat format
    chosen: list[int]
    rejected: list[int]
    qa: list[int]  # the prompt, in the question-answer format
    qa_chosen: list[int]
    qa_rejected: list[int]
    ends: set[int]  # what ends a completion
    as_lm_eval: bool = True  # see NOT_AS_LM_EVAL
    moved: int = 0  # line breaks that end the chat prompt; lm-eval scores them with the answer

    def __str__(self) -> str:
        return self.name


NOT_AS_LM_EVAL = (
    "lm-eval puts the EOS that is appended between prompt and answer, repeats a beginning that is "
    "not called BOS, and has no way without BOS and EOS"
)
KINDS = [
    Kind(
        "gpt-2: BOS and EOS are one token, and none is added",
        byte_level(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
        *(LINES, [10, 4, 30], [11, 4, 30]),
        *(ASKS, [10, 4, 30], [11, 4, 30]),
        ends={30},
    ),
    Kind(
        "opt: BOS and EOS are one token, and it is added",
        byte_level(["</s>"], "</s> $A", bos_token="</s>", eos_token="</s>"),
        *([30, *LINES], [10, 4, 30], [11, 4, 30]),
        *([30, *ASKS], [10, 4, 30], [11, 4, 30]),
        ends={30},
    ),
    Kind(
        "smollm2: BOS is the start of a turn, and is not added",
        byte_level(
            ["<|im_start|>", "<|im_end|>"],
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            chat_template=CHATML + OPENS,
        ),
        *([30, 13, 12, 1, 2, 31, 12, 30, 14, 12], [3, 4, 31], [5, 4, 31]),
        *(ASKS, [10, 4, 31], [11, 4, 31]),
        ends={31},
        moved=1,
    ),
    Kind(
        "qwen 2.5 base: no BOS, a system turn of the template's own, EOS is no end of turn",
        byte_level(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            eos_token="<|endoftext|>",
            chat_template=QWEN,
        ),
        *([31, 17, 12, 5, 4, 32, 12, 31, 13, 12, 1, 2, 32, 12, 31, 14, 12], [3, 4, 32], [5, 4, 32]),
        *(ASKS, [10, 4, 32], [11, 4, 32]),
        ends={30, 32},
        moved=1,
    ),
    Kind(
        "nemotron 3: it can think first, and is asked not to",
        byte_level(
            ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
            eos_token="<|im_end|>",
            chat_template=THINKS,
        ),
        *([30, 13, 12, 1, 2, 31, 12, 30, 14, 12, 32, 33], [3, 4, 31], [5, 4, 31]),
        *(ASKS, [10, 4, 31], [11, 4, 31]),
        ends={31},
    ),
    Kind(
        "llama 3: BOS both added and in the template, which also writes the day",
        byte_level(
            [
                *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                "<|end_of_text|>",
            ],
            "<|begin_of_text|> $A",
            lines="together",
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
            chat_template=LLAMA_3,
        ),
        [
            *(30, 31, 17, 32, 21, 18, 19, 20, 33),
            *(31, 13, 32, 21, 1, 2, 33, 31, 14, 32, 21),
        ],
        *([3, 4, 33], [5, 4, 33]),
        *([30, *ASKS], [10, 4, 33], [11, 4, 33]),
        ends={33, 34},
        moved=1,
    ),
    Kind(
        "glm 4: two tokens start a text, neither called BOS; no turn is closed",
        byte_level(
            ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|endoftext|>"],
            "[gMASK] <sop> $A",
            eos_token="<|endoftext|>",
            chat_template=GLM,
        ),
        *([30, 31, 32, 12, 1, 2, 33, 12], [3, 4, 34], [5, 4, 34]),
        *([30, 31, *ASKS], [10, 4, 34], [11, 4, 34]),
        ends={34},
        as_lm_eval=False,
        moved=1,
    ),
    Kind(
        "gpt-oss: an answer is in a channel that the generation prompt does not name",
        byte_level(
            ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"],
            eos_token="<|return|>",
            chat_template=GPT_OSS,
        ),
        *([30, 13, 31, 1, 2, 32, 30, 14, 33, 22, 31], [3, 4, 34], [5, 4, 34]),
        *(ASKS, [10, 4, 34], [11, 4, 34]),
        ends={34},
    ),
    Kind(
        "t5: EOS is appended to every text",
        byte_level(["</s>"], "$A </s>", eos_token="</s>"),
        *(LINES, [10, 4, 30], [11, 4, 30]),
        *(ASKS, [10, 4, 30], [11, 4, 30]),
        ends={30},
        as_lm_eval=False,
    ),
    Kind(
        "bert: a text is put between two tokens",
        byte_level(["[CLS]", "[SEP]"], "[CLS] $A [SEP]", cls_token="[CLS]", eos_token="[SEP]"),
        *([30, *LINES], [10, 4, 31], [11, 4, 31]),
        *([30, *ASKS], [10, 4, 31], [11, 4, 31]),
        ends={31},
        as_lm_eval=False,
    ),
    Kind(
        "no EOS, but a template that closes its turns",
        byte_level(["<|im_start|>", "<|im_end|>"], chat_template=CHATML + OPENS),
        *([30, 13, 12, 1, 2, 31, 12, 30, 14, 12], [3, 4, 31], [5, 4, 31]),
        *(ASKS, [10, 4, 31], [11, 4, 31]),
        ends={31},
        as_lm_eval=False,
        moved=1,
    ),
    Kind(
        "a template without generation prompt, which closes a turn on a line of its own",
        byte_level(
            ["<|im_start|>", "<|im_end|>", "</s>"],
            eos_token="</s>",
            chat_template=CHATML.replace("<|im_end|>", "\n<|im_end|>"),
        ),
        *([30, 13, 12, 1, 2, 12, 31, 12, 30, 14, 12], [3, 4, 31], [5, 4, 31]),
        *(ASKS, [10, 4, 31], [11, 4, 31]),
        ends={31, 32},
        moved=1,
    ),
    Kind(
        "zephyr: BOS is added, and the template writes none",
        sentence_piece([], "<s> $A", bos_token="<s>", eos_token="</s>", chat_template=ZEPHYR),
        *([1, 19, 8, 17, 7, 2, 3, 8, 20, 8], [15, 11, 2], [16, 11, 2]),
        *([1, *SP_ASKS], [10, 11, 2], [12, 11, 2]),
        ends={2},
        moved=1,
    ),
    Kind(
        "a llama that appends EOS as well",
        sentence_piece([], "<s> $A </s>", bos_token="<s>", eos_token="</s>", chat_template=ZEPHYR),
        *([1, 19, 8, 17, 7, 2, 3, 8, 20, 8], [15, 11, 2], [16, 11, 2]),
        *([1, *SP_ASKS], [10, 11, 2], [12, 11, 2]),
        ends={2},
        as_lm_eval=False,
        moved=1,
    ),
    Kind(
        "llama 2: spaces around the answer",
        sentence_piece([], "<s> $A", bos_token="<s>", eos_token="</s>", chat_template=LLAMA_2),
        *([1, 13, 6, 7, 14], [10, 11, 2], [12, 11, 2]),
        *([1, *SP_ASKS], [10, 11, 2], [12, 11, 2]),
        ends={2},
    ),
    Kind(
        "mistral: a space before the first word of a text only",
        sentence_piece(
            ["[INST]", "[/INST]"],
            "<s> $A",
            space="first",
            bos_token="<s>",
            eos_token="</s>",
            chat_template=MISTRAL,
        ),
        *([1, 25, 6, 7, 26], [10, 11, 2], [12, 11, 2]),
        *([1, *SP_ASKS], [10, 11, 2], [12, 11, 2]),
        ends={2},
    ),
    Kind(
        "gemma: no space before the first word, an end of turn that is not EOS",
        sentence_piece(
            ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
            "<bos> $A",
            space="never",
            bos_token="<bos>",
            eos_token="<eos>",
            chat_template=GEMMA,
        ),
        *([25, 27, 21, 8, 17, 7, 28, 8, 27, 22, 8], [15, 11, 28], [16, 11, 28]),
        *([25, 18, *SP_ASKS[1:]], [10, 11, 28], [12, 11, 28]),
        ends={26, 28},
        moved=1,
    ),
    Kind(
        "phi 3: special tokens swallow the line break after them",
        sentence_piece(
            ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
            rstrip=True,
            bos_token="<s>",
            eos_token="<|endoftext|>",
            chat_template=PHI_3,
        ),
        *([26, 6, 7, 27, 20], [10, 11, 27], [12, 11, 27]),
        *(SP_ASKS, [10, 11, 27], [12, 11, 27]),
        ends={25, 27},
    ),
    Kind(
        "vicuna: turns in plain words",
        sentence_piece([], "<s> $A", bos_token="<s>", eos_token="</s>", chat_template=VICUNA),
        *([1, 23, 6, 7, 24], [10, 11, 2], [12, 11, 2]),
        *([1, *SP_ASKS], [10, 11, 2], [12, 11, 2]),
        ends={2},
    ),
    Kind(  # a byte's id is the byte and 3
        "byt5: no fast tokenizer, EOS appended",
        ByT5Tokenizer(extra_ids=0),
        [
            *(88, 118, 104, 117, 61, 35, 90, 107, 124, 66, 13),
            *(68, 118, 118, 108, 118, 119, 100, 113, 119, 61),
        ],
        *([35, 86, 114, 49, 1], [35, 81, 114, 49, 1]),
        [84, 61, 35, 90, 107, 124, 66, 13, 68, 61],
        *([35, 86, 114, 49, 1], [35, 81, 114, 49, 1]),
        ends={1},
        as_lm_eval=False,
    ),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_training_generation_and_scoring_have_the_ids_worked_out_by_hand(kind: Kind) -> None:
    tokenizer = kind.tokenizer
    for form, prompt, answers, moved in (
        ("chat", kind.chat, [kind.chosen, kind.rejected], kind.moved),
        ("qa", kind.qa, [kind.qa_chosen, kind.qa_rejected], 0),
    ):
        example = tokenize_pair(tokenizer, PAIR, form)
        assert list(example.prompt_ids) == prompt
        assert [list(example.chosen_ids), list(example.rejected_ids)] == answers
        text = training_prompt(tokenizer, PAIR.question, form)
        assert token_ids(tokenizer, text) == prompt  # what generation is given
        for answer, ids in zip((PAIR.correct, PAIR.incorrect), answers, strict=True):
            request = training_request(tokenizer, PAIR.question, answer, form, item="p")
            (scored,) = encode_requests(tokenizer, [request], 100)
            assert scored.prompt.tolist() == prompt[: len(prompt) - moved]
            assert list(scored.completion) == [*prompt[len(prompt) - moved :], *ids]
            assert not scored.straddles
    assert end_ids(tokenizer, None) == kind.ends
    assert end_ids(tokenizer, 99) == end_ids(tokenizer, [99]) == {*kind.ends, 99}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_text_begins_twice_nor_ends_by_itself(kind: Kind) -> None:
    """In whatever way its beginning was written, and with demonstrations as well."""
    tokenizer, start = kind.tokenizer, start_ids(kind.tokenizer)
    begun = tokenizer.decode(start) if start else ""
    talk = render_chat(tokenizer, pair_messages("Why?", own_demonstrations("pair")[:2]))
    texts = [talk, "Q: Why?", f"{begun}Q: Why?", "So.", f"{begun}So."]
    for ids in encode_texts(tokenizer, texts):
        assert ids[: len(start)].tolist() == start
        assert ids[len(start) : 2 * len(start)].tolist() != start or not start
        assert ids[-1] not in kind.ends


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scoring_has_lm_evals_ids(kind: Kind) -> None:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM

    if not kind.as_lm_eval:
        pytest.skip(NOT_AS_LM_EVAL)
    tokenizer = kind.tokenizer
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    lm = SimpleNamespace(tokenizer=tokenizer, add_bos_token=None, prefix_token_id=bos)
    lm.backend, lm.tok_encode = "causal", lambda text: HFLM.tok_encode(lm, text)
    for form in ("chat", "qa"):
        request = training_request(tokenizer, PAIR.question, PAIR.correct, form, item="p")
        (encoded,) = encode_requests(tokenizer, [request], 100)
        theirs = TemplateLM._encode_pair(lm, request.prompt, request.completion)
        assert (encoded.prompt.tolist(), list(encoded.completion)) == theirs


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "chosen"),
    [
        (
            byte_level(["</s>"], eos_token="</s>", chat_template=BLANK_LINE),
            [15, 7, 8, 2, 21],
            [3, 4, 30],
        ),
        (
            sentence_piece([], eos_token="</s>", chat_template=ENDS_IN_A_SPACE),
            [23, 6, 7, 24, 3],
            [15, 11, 2],
        ),
    ],
)
def test_after_a_token_that_would_span_the_boundary_nothing_of_an_answer_is_lost(
    tokenizer: Fast, prompt: list[int], chosen: list[int]
) -> None:
    example = tokenize_pair(tokenizer, PAIR)
    assert (
        list(example.prompt_ids)
        == prompt
        == token_ids(tokenizer, training_prompt(tokenizer, "Why?"))
    )
    assert list(example.chosen_ids) == chosen


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_real_models(path: Path, tiny_llama: Path) -> None:
    """Those that TRL brings with it, each with its tokens added to a tokenizer that adds a BOS."""
    template = path.read_text(encoding="utf-8")
    tokens = {"<s>", *re.findall(r"<[a-z|/｜][^<> ]{2,40}[a-z|｜]>", template)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, chat_template=template, bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens)})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    if re.match("idefics|llava|smolvlm", path.stem):  # for images: these ask for text in parts
        with pytest.raises(ModelError, match="the model's chat template"):
            tokenize_pair(tokenizer, PAIR)
        return
    example = tokenize_pair(tokenizer, PAIR)
    assert list(example.prompt_ids) == token_ids(tokenizer, training_prompt(tokenizer, "Why?"))
    assert example.prompt_ids.count(bos) == 1 == example.prompt_ids[:1].count(bos)
    assert tokenizer.decode(example.prompt_ids).count("Why?") == 1
    for ids, answer in ((example.chosen_ids, "So."), (example.rejected_ids, "No.")):
        end = tokenizer.decode(ids).partition(answer)[2]
        assert [tokenizer.convert_tokens_to_ids(end)] == [*ids[-1:]]
        assert ids[-1] in end_ids(tokenizer, None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Only for tools') }}", "take turns: Only for tools"),
        ("{{ messages[0].content.text.upper() }}", "take turns: .*no attribute 'text'"),
        ("{{ 'a' + 1 }}", "take turns: "),
        ("{% if %}", "take turns: Expected an expression"),
        ({"tools": "{{ messages }}"}, "take turns: .*multiple chat templates"),
        (
            EACH + "{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
            "leaves out what the user says",
        ),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str | dict, message: str) -> None:
    tokenizer = byte_level(["</s>"], eos_token="</s>")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=message):
        tokenize_pair(tokenizer, PAIR)
    assert tokenize_pair(tokenizer, PAIR, "qa").chosen_ids == (10, 4, 30)  # which needs none
    assert end_ids(tokenizer, None) == {30}


def test_a_tokenizer_without_special_tokens_scores_and_does_not_train() -> None:
    tokenizer = byte_level([])
    assert end_ids(tokenizer, None) == set()
    request = training_request(tokenizer, "Why?", "So.", "qa", item="p")
    (encoded,) = encode_requests(tokenizer, [request], 100)
    assert (encoded.prompt.tolist(), encoded.completion) == (ASKS, (10, 4))
    with pytest.raises(ModelError, match="no eos_token, and its chat template closes no turn"):
        tokenize_pair(tokenizer, PAIR)
    with pytest.raises(ScoringError, match="item p: the prompt is empty"):
        encode_requests(tokenizer, [Request("", "So.", "p")], 100)


def test_a_configuration_that_takes_special_tokens_for_letters_changes_nothing(
    tiny_llama: Path,
) -> None:
    usual, odd = (
        AutoTokenizer.from_pretrained(tiny_llama, split_special_tokens=split)
        for split in (False, True)
    )
    assert tokenize_pair(usual, PAIR) == tokenize_pair(odd, PAIR)


@pytest.mark.parametrize(
    ("tokenizer", "prompt"),
    [
        (byte_level(["<s>", "</s>"], "<s> $A", bos_token="<s>", eos_token="</s>"), [30]),
        (byte_level(["<s>", "</s>"], bos_token="<s>", eos_token="</s>"), [30]),
        (byte_level(["</s>"], eos_token="</s>"), [30]),
        (byte_level(["[gMASK]", "<sop>"], "[gMASK] <sop> $A"), [30, 31]),
    ],
)
def test_an_empty_prompt_is_the_start_of_a_text(tokenizer: Fast, prompt: list[int]) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")  # is empty as well
    for text, words in (("", (3, 4)), ("~", (3, 4)), (" ", (10, 4))):
        (encoded,) = encode_requests(tokenizer, [Request(text, "So.", "p")], 100)
        assert (encoded.prompt.tolist(), encoded.completion) == (prompt, words)


def test_a_start_behind_white_space_is_no_reason_for_a_second_one() -> None:
    tokenizer = sentence_piece([], "<s> $A", bos_token="<s>", eos_token="</s>")
    start = start_ids(tokenizer)
    for text in (" <s>So.", "\n<s>So.", "So <s>"):
        (ids,) = encode_texts(tokenizer, [text])
        assert ids.tolist().count(start[0]) == (2 if text == "So <s>" else 1)


def zephyr(folder: Path, rows: int, **options: str) -> Policy:
    """Load a random Llama with as many rows in its embedding and the tokenizer of Zephyr's kind."""
    tokenizer = sentence_piece(
        [], "<s> $A", bos_token="<s>", eos_token="</s>", chat_template=ZEPHYR, **options
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, num_attention_heads=2, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return load_base(ModelConfig(name=str(folder), device="cpu", dtype="float32"))


def test_the_model_is_given_the_ids_that_it_is_trained_on(tmp_path: Path) -> None:
    policy = zephyr(tmp_path, 25)
    example = tokenize_pair(policy.tokenizer, PAIR)
    text = training_prompt(policy.tokenizer, PAIR.question)
    by_text, by_ids = (
        generate(policy, [prompt], max_new_tokens=4) for prompt in (text, example.prompt_ids)
    )
    assert by_text == by_ids
    request = training_request(policy.tokenizer, PAIR.question, PAIR.correct, item="p")
    (score,) = score_completions(policy, [request])
    ids = torch.tensor([[*example.prompt_ids, *example.chosen_ids]])
    with torch.inference_mode():
        logprobs = policy.model(ids).logits[0, :-1].log_softmax(-1)
    logprobs = logprobs.gather(1, ids[0, 1:, None])[-score.tokens :]
    assert score.tokens == len(example.chosen_ids) + 1  # lm-eval counts the line break
    assert score.logprob == pytest.approx(logprobs.sum().item(), abs=1e-4)


def test_tokens_that_the_model_has_no_embedding_for_are_named(tmp_path: Path) -> None:
    policy = zephyr(tmp_path / "padded", 25, pad_token="[PAD]")  # which the tokenizer adds
    assert policy.tokenizer.pad_token == "</s>"
    text = "Q: [PAD]\nA:"
    with pytest.raises(ModelError, match=r"token 25 \('\[PAD\]'\), .* embeddings for 25 only"):
        generate(policy, [text], max_new_tokens=1)
    with pytest.raises(ModelError, match=r"token 25 \('\[PAD\]'\)"):
        score_completions(policy, [Request(text, " So.", "p")])
    with pytest.raises(ModelError, match="vocabulary of 25, and the model has embeddings for 24"):
        zephyr(tmp_path / "other", 24)
