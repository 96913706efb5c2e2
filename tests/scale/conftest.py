"""As little as a whole run can be, on the tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from grath_utils.files import write_jsonl


@pytest.fixture(scope="session")
def tiny_settings(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings that turn the profile ``smoke`` into a run of a second or two."""
    questions = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = [{"id": f"q{i}", "question": f"What is thing number {i}?"} for i in range(6)]
    write_jsonl(questions, rows)
    return {
        "model.name": str(tiny_llama),
        "model.dtype": "float32",
        "model.device": "cpu",
        "questions.source": str(questions),
        "questions.limit": None,
        "pairs.filters": ["none"],
        "pairs.shots": 0,
        "pairs.candidates": 6,
        "pairs.max_new_tokens": 8,
        "dpo.learning_rate": 0.05,
        "dpo.warmup_steps": 0,
        "dpo.steps": 1,
        "loop.iterations": 1,
        "evaluation.benchmarks": ["probe"],
        "evaluation.limit": 6,
        "evaluation.bootstrap": 100,
    }
